// A set of tensors, for pop-graph.cpp. A graph has a thousand of them and each micro-batch has a new graph, so the set
// keeps them in one piece of memory: std::unordered_set took longer for the rewrite of a graph than all else did.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

struct ggml_tensor;

class pop_tensor_set {
public:
    // Returns whether the tensor is new.
    bool insert(const ggml_tensor * t) {
        if (2 * members.size() >= slots.size()) {
            grow();
        }
        const ggml_tensor *& slot = slots[slot_of(t)];
        if (slot) {
            return false;
        }
        slot = t;
        members.push_back(t);
        return true;
    }

    bool count(const ggml_tensor * t) const { return !members.empty() && slots[slot_of(t)]; }

    size_t size() const { return members.size(); }

    // In the order in which they were inserted.
    std::vector<const ggml_tensor *>::const_iterator begin() const { return members.begin(); }

    std::vector<const ggml_tensor *>::const_iterator end() const { return members.end(); }

private:
    std::vector<const ggml_tensor *> members;
    std::vector<const ggml_tensor *> slots; // 2^n, at most half of them in use; a tensor is in the first free one

    // The slot that holds the tensor, or else the free one where it belongs.
    size_t slot_of(const ggml_tensor * t) const {
        // The product spreads addresses, which are multiples of a power of two, over the upper bits.
        const uint64_t product = (uint64_t) (uintptr_t) t * 0x9E3779B97F4A7C15u;
        size_t         i       = (product >> 32) & (slots.size() - 1);
        while (slots[i] && slots[i] != t) {
            i = (i + 1) & (slots.size() - 1);
        }
        return i;
    }

    void grow() {
        slots.assign(slots.empty() ? 64 : 4 * slots.size(), nullptr);
        for (const ggml_tensor * t : members) {
            slots[slot_of(t)] = t;
        }
    }
};
