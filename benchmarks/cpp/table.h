// Rows of results as a text table and as JSON.
#pragma once

#include <cstdint>
#include <cstdio>
#include <ctime>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "device.h"
#include "options.h"

namespace bench {

/// Nothing, text, a count or a measured number.
using Cell = std::variant<std::monostate, std::string, int64_t, double>;

struct Column {
  const char* key;     // in JSON
  const char* title;   // in the table
  const char* format;  // printf's, of a measured number; JSON has it in full
};

class Table {
 public:
  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}

  /// Cells in the order of the columns; missing ones at the end are nothing.
  void add(std::vector<Cell> cells) {
    cells.resize(columns_.size());
    rows_.push_back(std::move(cells));
  }

  void print() const {
    std::vector<std::vector<std::string>> lines(1);
    for (const Column& column : columns_) lines[0].push_back(column.title);
    for (const auto& row : rows_) {
      lines.emplace_back();
      for (size_t c = 0; c < row.size(); ++c) lines.back().push_back(shown(row[c], c));
    }
    std::vector<size_t> widths(columns_.size());
    for (const auto& line : lines) {
      for (size_t c = 0; c < line.size(); ++c) widths[c] = std::max(widths[c], line[c].size());
    }
    for (const auto& line : lines) {
      std::string text;
      for (size_t c = 0; c < line.size(); ++c) {
        const std::string space(widths[c] - line[c].size(), ' ');
        text += (c == 0 ? "" : "  ") + (is_text(c) ? line[c] + space : space + line[c]);
      }
      text.erase(text.find_last_not_of(' ') + 1);
      std::printf("%s\n", text.c_str());
    }
  }

  std::string json() const {
    std::string text = "[";
    for (const auto& row : rows_) {
      text += text.size() == 1 ? "\n    {" : ",\n    {";
      bool first = true;
      for (size_t c = 0; c < row.size(); ++c) {
        if (std::holds_alternative<std::monostate>(row[c])) continue;
        text += std::string(first ? "" : ", ") + quoted(columns_[c].key) + ": " + value(row[c]);
        first = false;
      }
      text += "}";
    }
    return text + "\n  ]";
  }

  static std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (const char c : text) {
      if (c == '"' || c == '\\') out += '\\';
      if (static_cast<unsigned char>(c) >= ' ') out += c;
    }
    return out + '"';
  }

 private:
  bool is_text(size_t column) const {
    for (const auto& row : rows_) {
      if (row[column].index() > 1) return false;
    }
    return true;
  }

  std::string shown(const Cell& cell, size_t column) const {
    if (std::holds_alternative<std::monostate>(cell)) return "-";
    if (const auto* number = std::get_if<double>(&cell)) {
      char text[64];
      std::snprintf(text, sizeof text, columns_[column].format, *number);
      return text;
    }
    const auto* words = std::get_if<std::string>(&cell);
    return words != nullptr ? *words : value(cell);
  }

  static std::string value(const Cell& cell) {
    if (const auto* count = std::get_if<int64_t>(&cell)) return std::to_string(*count);
    if (const auto* words = std::get_if<std::string>(&cell)) return quoted(*words);
    char text[64];
    std::snprintf(text, sizeof text, "%.9g", std::get<double>(cell));
    return text;
  }

  std::vector<Column> columns_;
  std::vector<std::vector<Cell>> rows_;
};

inline std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

/// Prints device and table; writes JSON where --json names a file.
inline void report(const char* benchmark, const Options& options, const DeviceFacts& facts,
                   const Table& table) {
  char date[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S+00:00", std::gmtime(&now));
  std::printf("%s, %d SMs; CUDA %s (driver %s); commit %s; %s\n", facts.name.c_str(),
              facts.multiprocessors, version_text(facts.runtime).c_str(),
              version_text(facts.driver).c_str(), options.text("commit").c_str(), date);
  table.print();
  const std::string& file = options.text("json");
  if (file.empty()) return;
  const auto quoted = [](const std::string& text) { return Table::quoted(text); };
  std::string text = "{\n  \"benchmark\": " + quoted(benchmark) +
                     ",\n  \"machine\": {\"gpu\": " + quoted(facts.name) +
                     ", \"multiprocessors\": " + std::to_string(facts.multiprocessors) +
                     ", \"l2_bytes\": " + std::to_string(facts.l2_bytes) +
                     ", \"cuda\": " + quoted(version_text(facts.runtime)) +
                     ", \"driver_cuda\": " + quoted(version_text(facts.driver)) +
                     ", \"date\": " + quoted(date) + "},\n  \"arguments\": {";
  bool first = true;
  for (const auto& [name, given] : options.values()) {
    if (name == "json") continue;
    text += std::string(first ? "" : ", ") + quoted(name) + ": " + quoted(given);
    first = false;
  }
  text += "},\n  \"results\": " + table.json() + "\n}\n";
  std::FILE* out = std::fopen(file.c_str(), "w");
  const bool written = out != nullptr && std::fputs(text.c_str(), out) >= 0;
  if ((out != nullptr && std::fclose(out) != 0) || !written) {
    throw std::runtime_error("--json: cannot write " + file);
  }
  std::printf("wrote %s\n", file.c_str());
}

inline void add_report_options(Options& options) {
  options.add("json", "FILE", "", "write the results there, too");
  options.add("commit", "ID", "unknown", "commit to record");
}

}  // namespace bench
