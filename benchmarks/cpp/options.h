// Command line options: --name VALUE and --flag, with errors that name the option.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace bench {

/// What the user can put right; the text starts with the option.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline std::string join(const std::vector<std::string>& words, const char* between) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : between) + word;
  return text;
}

class Options {
 public:
  Options(std::string program, std::string about)
      : program_(std::move(program)), about_(std::move(about)) {
    flag("help", "show this text");
  }

  void add(const std::string& name, const std::string& metavar, const std::string& value,
           const std::string& help) {
    options_.push_back({name, metavar, value, help});
  }
  /// An option without a value, off unless given.
  void flag(const std::string& name, const std::string& help) { add(name, "", "", help); }

  void parse(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      const std::string word = argv[i];
      Option* option = word.rfind("--", 0) == 0 ? find(word.substr(2)) : nullptr;
      if (option == nullptr) throw UsageError(word + ": expected an option, see --help");
      if (option->metavar.empty()) {
        option->value = "on";
      } else if (++i < argc) {
        option->value = argv[i];
      } else {
        throw UsageError(word + ": expected " + option->metavar + ", got nothing");
      }
    }
  }

  void print_help() const {
    std::printf("usage: %s [options]\n\n%s\n\n", program_.c_str(), about_.c_str());
    for (const Option& option : options_) {
      std::printf("  --%s%s%s\n      %s", option.name.c_str(), option.metavar.empty() ? "" : " ",
                  option.metavar.c_str(), option.help.c_str());
      if (!option.metavar.empty() && !option.value.empty()) {
        std::printf(" (default: %s)", option.value.c_str());
      }
      std::printf("\n");
    }
  }

  bool on(const std::string& name) const { return !text(name).empty(); }
  const std::string& text(const std::string& name) const {
    for (const Option& option : options_) {
      if (option.name == name) return option.value;
    }
    throw std::logic_error("no option " + name);
  }
  /// Every option with a value, as given or by default.
  std::vector<std::pair<std::string, std::string>> values() const {
    std::vector<std::pair<std::string, std::string>> all;
    for (const Option& option : options_) {
      if (!option.metavar.empty()) all.emplace_back(option.name, option.value);
    }
    return all;
  }

  int64_t integer(const std::string& name, int64_t low, int64_t high) const {
    return integer(name, text(name), low, high);
  }
  std::vector<int64_t> integers(const std::string& name, int64_t low, int64_t high) const {
    std::vector<int64_t> values;
    for (const std::string& part : list(name)) values.push_back(integer(name, part, low, high));
    return values;
  }
  std::vector<double> numbers(const std::string& name, double low, double high) const {
    std::vector<double> values;
    for (const std::string& part : list(name)) {
      char* end = nullptr;
      const double value = std::strtod(part.c_str(), &end);
      if (end == part.c_str() || *end != '\0' || !(value >= low && value <= high)) {
        throw UsageError("--" + name + ": expected numbers from " + std::to_string(low) + " to " +
                         std::to_string(high) + ", got " + part);
      }
      values.push_back(value);
    }
    return values;
  }
  /// A:B,A:B,...
  std::vector<std::pair<int32_t, int32_t>> pairs(const std::string& name) const {
    std::vector<std::pair<int32_t, int32_t>> values;
    for (const std::string& part : list(name)) {
      const size_t colon = part.find(':');
      if (colon == std::string::npos) {
        throw UsageError("--" + name + ": expected two sizes A:B, got " + part);
      }
      const auto size = [&](const std::string& digits) {
        return static_cast<int32_t>(integer(name, digits, 0, INT32_MAX));
      };
      values.emplace_back(size(part.substr(0, colon)), size(part.substr(colon + 1)));
    }
    return values;
  }
  std::vector<std::string> words(const std::string& name,
                                 const std::vector<std::string>& allowed) const {
    const std::vector<std::string> given = list(name);
    for (const std::string& word : given) {
      bool known = false;
      for (const std::string& one : allowed) known = known || one == word;
      if (!known) {
        throw UsageError("--" + name + ": expected " + join(allowed, " or ") + ", got " + word);
      }
    }
    return given;
  }

 private:
  struct Option {
    std::string name;
    std::string metavar;  // empty: a flag
    std::string value;
    std::string help;
  };

  Option* find(const std::string& name) {
    for (Option& option : options_) {
      if (option.name == name) return &option;
    }
    return nullptr;
  }

  /// The parts between the commas, none of them empty.
  std::vector<std::string> list(const std::string& name) const {
    std::vector<std::string> parts(1);
    for (const char c : text(name)) {
      if (c == ',') {
        parts.emplace_back();
      } else {
        parts.back() += c;
      }
    }
    for (const std::string& part : parts) {
      if (part.empty()) {
        throw UsageError("--" + name + ": expected values parted by commas, got \"" + text(name) +
                         '"');
      }
    }
    return parts;
  }

  static int64_t integer(const std::string& name, const std::string& digits, int64_t low,
                         int64_t high) {
    char* end = nullptr;
    const long long value = std::strtoll(digits.c_str(), &end, 10);
    if (end == digits.c_str() || *end != '\0' || value < low || value > high) {
      throw UsageError("--" + name + ": expected an integer from " + std::to_string(low) + " to " +
                       std::to_string(high) + ", got " + digits);
    }
    return value;
  }

  std::string program_;
  std::string about_;
  std::vector<Option> options_;
};

}  // namespace bench
