// Times calls on one stream by events: median, smallest and largest.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "device.h"
#include "options.h"

namespace bench {

struct Timing {
  double ms;  // median
  double ms_min;
  double ms_max;
  int repeats;
};

inline void add_timer_options(Options& options) {
  options.add("warm-up", "N", "2", "untimed calls before the timed ones");
  options.add("repeats", "N", "20", "most timed calls of a case");
  options.add("budget-ms", "N", "1000", "timed span of a case; 3 calls at least");
  options.flag("no-flush", "do not clear the L2 cache before every call");
}

/// Before every call a buffer of twice the L2 cache is written, unless --no-flush is given. All
/// calls are submitted before the host waits once: the writes keep the device busy meanwhile.
class Timer {
 public:
  Timer(const Options& options, const DeviceFacts& facts, cudaStream_t stream)
      : stream_(stream),
        warm_up_(static_cast<int>(options.integer("warm-up", 1, 1000))),
        repeats_(static_cast<int>(options.integer("repeats", 1, 100000))),
        budget_ms_(static_cast<double>(options.integer("budget-ms", 1, 1000000))),
        flush_("L2 flush", options.on("no-flush") ? 0 : 2 * facts.l2_bytes) {}

  template <class Call>
  Timing operator()(const Call& call) const {
    return (*this)(call, [] {});
  }

  /// `before` is called before every call, outside the timed span.
  template <class Call, class Before>
  Timing operator()(const Call& call, const Before& before) const {
    double guess = 0;
    for (int i = 0; i < warm_up_; ++i) guess = run(call, before, 1)[0];
    const double fits = budget_ms_ / std::max(guess, 1e-3);
    const int repeats = static_cast<int>(std::min<double>(repeats_, std::max(3.0, fits)));
    std::vector<double> times = run(call, before, repeats);
    std::sort(times.begin(), times.end());
    const size_t middle = times.size() / 2;
    const double median =
        times.size() % 2 == 1 ? times[middle] : (times[middle - 1] + times[middle]) / 2;
    return {median, times.front(), times.back(), repeats};
  }

 private:
  template <class Call, class Before>
  std::vector<double> run(const Call& call, const Before& before, int repeats) const {
    std::vector<Event> starts(static_cast<size_t>(repeats)), ends(static_cast<size_t>(repeats));
    for (size_t i = 0; i < starts.size(); ++i) {
      before();
      if (flush_.size() > 0) {
        check(cudaMemsetAsync(flush_.get(), 1, static_cast<size_t>(flush_.size()), stream_),
              "L2 flush");
      }
      check(cudaEventRecord(starts[i].get(), stream_), "event");
      call();
      check(cudaEventRecord(ends[i].get(), stream_), "event");
    }
    check(cudaStreamSynchronize(stream_), "timed calls");
    std::vector<double> times;
    for (size_t i = 0; i < starts.size(); ++i) {
      float ms = 0;
      check(cudaEventElapsedTime(&ms, starts[i].get(), ends[i].get()), "event");
      times.push_back(ms);
    }
    return times;
  }

  cudaStream_t stream_;
  int warm_up_;
  int repeats_;
  double budget_ms_;
  Buffer<char> flush_;
};

}  // namespace bench
