#include "pop-cache-record.h"

#include "json.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <stdexcept>

using json = common_json;

// The end of a slot file: a JSON text, its size, the checksum of all bytes before the checksum, and this mark.
static constexpr char     MARK[8]  = { 'P', 'O', 'P', 'S', 'L', 'O', 'T', '1' };
static constexpr uint64_t N_FOOTER = sizeof(uint64_t) + sizeof(uint64_t) + sizeof(MARK);

void pop_reading::use_adapters(const std::vector<common_adapter_lora_info> & adapters, int32_t invocation_start) {
    for (const auto & adapter : adapters) {
        if (adapter.scale != 0.0f) {
            this->adapters += string_format("%s\t%.9g\n", adapter.path.c_str(), adapter.scale);
        }
    }
    // llama-server reads the token before the invocation with the adapter, too
    adapted_from = this->adapters.empty() ? NONE : std::max(0, invocation_start - 1);
}

int32_t pop_cache_record::n_usable(int32_t n_past, const pop_reading & reading) const {
    if (!reading.prunes) {
        n_past = std::min(n_past, pruned_from);
    }
    if (!reading.moves) {
        n_past = std::min(n_past, moved_from);
    }
    if (adapters != reading.adapters || adapted_from != reading.adapted_from) {
        n_past = std::min({ n_past, adapted_from, reading.adapted_from });
    }
    return n_past;
}

bool pop_cache_record::may_move(const pop_reading & reading) const {
    // a chunk that moves across the start of an adapter would have been read with the wrong weights
    return reading.moves && adapters == reading.adapters && adapted_from == reading.adapted_from &&
           (adapted_from == 0 || adapted_from == NONE);
}

void pop_cache_record::move(int32_t n_keep) {
    moved_from   = std::min(moved_from, n_keep);
    pruned_from  = pruned_from == NONE ? NONE : std::min(pruned_from, n_keep);
    adapted_from = adapted_from == NONE ? NONE : std::min(adapted_from, n_keep);
}

void pop_cache_record::complete(int32_t n_whole) {
    pruned_from = std::max(pruned_from, n_whole);
}

void pop_cache_record::begin(int32_t n_past, bool prunes, const pop_reading & reading) {
    if (pruned_from >= n_past) {
        pruned_from = prunes ? n_past : NONE;
    }
    if (moved_from >= n_past) {
        moved_from = NONE;
    }
    adapters     = reading.adapters;
    adapted_from = reading.adapted_from;
}

// A checksum that finds damage; it is no protection against a forger. The file is read in pieces of words.
static uint64_t checksum(std::istream & file, uint64_t n_bytes) {
    std::vector<char> piece(1 << 20);
    uint64_t          sum = 14695981039346656037u ^ n_bytes;
    while (n_bytes > 0) {
        const size_t n_read = std::min<uint64_t>(n_bytes, piece.size());
        file.read(piece.data(), n_read);
        std::fill(piece.begin() + n_read, piece.end(), 0);
        for (size_t i = 0; i < n_read; i += sizeof(uint64_t)) {
            uint64_t word;
            std::memcpy(&word, piece.data() + i, sizeof(word));
            sum = (sum ^ word) * 1099511628211u;
            sum ^= sum >> 29;
        }
        n_bytes -= n_read;
    }
    return sum;
}

size_t pop_cache_record::write(const std::string & path) const {
    json record;
    record["pruned_from"]  = pruned_from;
    record["moved_from"]   = moved_from;
    record["adapters"]     = adapters;
    record["adapted_from"] = adapted_from;

    const std::string text = record.dump_safe();

    std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out | std::ios::ate);
    if (!file) {
        return 0;
    }
    const uint64_t n_state = file.tellg();
    const uint64_t n_text  = text.size();
    file.write(text.data(), n_text);
    file.write(reinterpret_cast<const char *>(&n_text), sizeof(n_text));
    file.seekg(0);
    const uint64_t sum = checksum(file, n_state + n_text + sizeof(n_text));
    file.seekp(0, std::ios::end);
    file.write(reinterpret_cast<const char *>(&sum), sizeof(sum));
    file.write(MARK, sizeof(MARK));
    file.close();
    return file ? n_text + N_FOOTER : 0;
}

size_t pop_cache_record::read(const std::string & path) {
    std::ifstream  file(path, std::ios::binary | std::ios::ate);
    const uint64_t n_file = file ? uint64_t(file.tellg()) : 0;
    if (n_file < N_FOOTER) {
        return 0;
    }

    uint64_t n_text, sum;
    char     mark[sizeof(MARK)] = {};
    file.seekg(n_file - N_FOOTER);
    file.read(reinterpret_cast<char *>(&n_text), sizeof(n_text));
    file.read(reinterpret_cast<char *>(&sum), sizeof(sum));
    file.read(mark, sizeof(mark));
    if (std::memcmp(mark, MARK, sizeof(MARK)) != 0) {
        return 0;
    }

    file.seekg(0);
    if (n_text > n_file - N_FOOTER || checksum(file, n_file - sizeof(sum) - sizeof(mark)) != sum) {
        throw std::runtime_error("the file is damaged: its checksum does not match");
    }

    std::string text(n_text, ' ');
    file.seekg(n_file - N_FOOTER - n_text);
    file.read(text.data(), n_text);
    const json record = json::parse(text);
    pruned_from       = record.at("pruned_from").get<int32_t>();
    moved_from        = record.at("moved_from").get<int32_t>();
    adapters          = record.at("adapters").get<std::string>();
    adapted_from      = record.at("adapted_from").get<int32_t>();
    return n_text + N_FOOTER;
}
