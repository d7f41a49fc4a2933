// out[i] = table[ids[i]], rows of so many bytes.
#include <cstdint>
#include <cstring>

// A row that the table does not have is filled with ones, which is NaN in every kind of float.
extern "C" void rows(const void *table, const void *ids, void *out, long count, long in_table, long bytes) {
    for (long i = 0; i < count; i++) {
        int64_t id = ((const int64_t *)ids)[i];
        char *to = (char *)out + i * bytes;
        if (id >= 0 && id < in_table)
            memcpy(to, (const char *)table + id * bytes, size_t(bytes));
        else
            memset(to, 0xff, size_t(bytes));
    }
}
