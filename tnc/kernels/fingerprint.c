/* Sums of the words of some memory by rows and by columns of a table, modulo 2^64, in one pass. */

#include <stdint.h>
#include <string.h>

enum { WIDTH = 256 }; /* words in a row */

static uint64_t row_sums(const unsigned char *bytes, uint64_t *columns)
{
    uint64_t total = 0;
    for (int64_t c = 0; c < WIDTH; c++) {
        uint64_t word;
        memcpy(&word, bytes + 8 * c, 8); /* at any address */
        total += word;
        columns[c] += word;
    }
    return total;
}

/* size bytes, the last row filled up with zeros -> WIDTH sums by columns, zero before, then one for each row. */
void table_sums(const unsigned char *bytes, uint64_t *sums, int64_t size)
{
    uint64_t *rows = sums + WIDTH;
    int64_t whole = size / (8 * WIDTH);
    for (int64_t r = 0; r < whole; r++)
        rows[r] = row_sums(bytes + r * 8 * WIDTH, sums);
    int64_t rest = size - whole * 8 * WIDTH;
    if (rest > 0) {
        unsigned char last[8 * WIDTH] = {0};
        memcpy(last, bytes + size - rest, rest);
        rows[whole] = row_sums(last, sums);
    }
}
