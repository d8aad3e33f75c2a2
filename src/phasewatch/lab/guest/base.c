/* Time, randomness and files for the guest program. */
#define _GNU_SOURCE
#include "guest.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static uint64_t state = 88172645463325252ull;
static volatile uint64_t kept; /* keeps the compiler from removing the work */

double knob(const struct job *job, const char *name, double otherwise) {
    for (int i = 0; i < job->knobs; i++)
        if (strcmp(job->knob[i].name, name) == 0) return job->knob[i].value;
    return otherwise;
}

const char *word(const struct job *job, const char *name, const char *otherwise) {
    for (int i = 0; i < job->knobs; i++)
        if (strcmp(job->knob[i].name, name) == 0) return job->knob[i].text;
    return otherwise;
}

uint64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

void nap_ms(double ms) {
    if (ms <= 0) return;
    struct timespec t = {(time_t)(ms / 1000), (long)(fmod(ms, 1000) * 1e6)};
    while (nanosleep(&t, &t) != 0 && errno == EINTR) {}
}

void seed_random(uint64_t seed) {
    state = seed * 0x9e3779b97f4a7c15ull + 0x632be59bd9b4e019ull;
    if (state == 0) state = 1;
    for (int i = 0; i < 8; i++) random_u64();
}

uint64_t random_u64(void) { /* xorshift64* */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545f4914f6cdd1dull;
}

double uniform(void) { return (double)(random_u64() >> 11) / 9007199254740992.0; }

double exponential(double mean) {
    double draw = -log(1.0 - uniform()) * mean;
    return draw > 5 * mean ? 5 * mean : draw;
}

void fill_random(void *at, size_t n) {
    unsigned char *p = at;
    for (size_t i = 0; i < n; i += 8) {
        uint64_t r = random_u64();
        memcpy(p + i, &r, n - i < 8 ? n - i : 8);
    }
}

int run(const char *const argv[]) {
    pid_t child = fork();
    if (child == 0) {
        int null = open("/dev/null", O_RDWR);
        dup2(null, 0), dup2(null, 1), dup2(null, 2);
        execv("/bin/busybox", (char *const *)argv);
        execvp(argv[0], (char *const *)argv); /* an image with real programs */
        _exit(127);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

static void fill_from(unsigned char *at, size_t n, char *phrase, size_t size) { /* rotated, so that no two blocks are equal */
    for (size_t from = random_u64() % size; n > 0; from = 0) {
        size_t part = size - from < n ? size - from : n;
        memcpy(at, phrase + from, part), at += part, n -= part;
    }
}

void fill(void *at, size_t n, enum content content) {
    static char text[4096], code[4096];
    static const char *const words[] = {"order ", "report ", "the ", "draft ", "of ", "phase ", "table ", "and ", "memo.\n", "to "};
    static const char *const lines[] = {"    if (x < 0) return -1;\n", "int next(int at) {\n", "    for (int i = 0; i < n; i++)\n", "}\n\n", "        sum += row[i];\n"};
    if (*text == 0) {
        for (size_t have = 0; have < sizeof text - 32;) have += (size_t)sprintf(text + have, "%s", words[random_u64() % 10]);
        for (size_t have = 0; have < sizeof code - 32;) have += (size_t)sprintf(code + have, "%s", lines[random_u64() % 5]);
    }
    if (content == TEXT) fill_from(at, n, text, strlen(text));
    else if (content == CODE) fill_from(at, n, code, strlen(code));
    else {
        fill_random(at, n);
        if (content == PACKED && n > 4) memcpy(at, "\037\213\010", 3); /* the magic of gzip */
    }
}

void give_up(void) { _exit(3); }

static double cold;

void be_cold(double share) { cold = share; }

void cool(const char *path) {
    if (cold <= 0 || uniform() >= cold) return;
    int fd = open(path, O_RDONLY);
    if (fd < 0) return;
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    close(fd);
}

void burn(double ms, unsigned char *memory, size_t bytes) {
    uint64_t until = now_ms() + (uint64_t)ms, h = random_u64();
    while (now_ms() < until)
        for (int i = 0; i < 4000; i++) {
            h = (h ^ (h >> 29)) * 0xbf58476d1ce4e5b9ull + (uint64_t)i;
            if (memory != NULL) h += memory[h % bytes], memory[(h >> 20) % bytes] = (unsigned char)h;
        }
    kept = h;
}

void scramble(const char *path, long from, long most, long step) {
    static unsigned char block[16384];
    int fd = open(path, O_RDWR);
    if (fd < 0) return;
    posix_fadvise(fd, 0, 0, cold > 0 && uniform() < cold ? POSIX_FADV_DONTNEED : POSIX_FADV_NORMAL);
    for (long at = from, n; at < most && (n = pread(fd, block, sizeof block, at)) > 0; at += step > n ? step : n) {
        for (long i = 0; i < n; i += 8) { uint64_t r = random_u64(); for (int k = 0; k < 8 && i + k < n; k++) block[i + k] ^= (unsigned char)(r >> (8 * k)); }
        if (pwrite(fd, block, (size_t)n, at) != n) give_up();
    }
    close(fd);
}

long replace_file(const char *path, int keep) {
    char fresh[160];
    struct stat info;
    size_t size = strlen(path);
    int locked = size > 4 && strcmp(path + size - 4, ".lck") == 0;
    if (stat(path, &info) != 0) return 0;
    snprintf(fresh, sizeof fresh, locked ? "%.*s" : "%.*s.lck", (int)(locked ? size - 4 : size), path);
    read_file(path);
    write_file(fresh, (long)info.st_size, 0);
    if (!keep) unlink(path);
    return (long)info.st_size;
}

int write_file(const char *path, long bytes, double bytes_per_s) { return write_as(path, bytes, bytes_per_s, RANDOM); }

long append_file(const char *path, long bytes, enum content content, long most) {
    static char block[16384];
    struct stat info;
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | (stat(path, &info) == 0 && info.st_size > most ? O_TRUNC : 0), 0644);
    if (fd < 0) give_up();
    for (long left = bytes; left > 0;) {
        long n = left < (long)sizeof block ? left : (long)sizeof block;
        fill(block, (size_t)n, content);
        if (write(fd, block, (size_t)n) != n) give_up();
        left -= n;
    }
    fsync(fd);
    close(fd);
    return bytes;
}

int write_as(const char *path, long bytes, double bytes_per_s, enum content content) {
    static char block[16384];
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0) give_up();
    if (content == MIXED) content = (enum content)(random_u64() % 4);
    for (long left = bytes; left > 0;) {
        long n = left < (long)sizeof block ? left : (long)sizeof block;
        fill(block, (size_t)n, content);
        if (write(fd, block, (size_t)n) != n) give_up();
        left -= n;
        if (bytes_per_s > 0) nap_ms(1000.0 * (double)n / bytes_per_s);
    }
    return close(fd);
}

long read_file(const char *path) {
    static char block[16384];
    cool(path);
    int fd = open(path, O_RDONLY);
    if (fd < 0) return -1;
    long total = 0, n;
    while ((n = read(fd, block, sizeof block)) > 0) total += n;
    close(fd);
    return total;
}

static int by_name(const void *a, const void *b) { return strcmp(a, b); }

static int gather(const char *folder, char paths[][128], int most, int have) {
    DIR *dir = opendir(folder);
    if (dir == NULL) return have;
    struct dirent *entry;
    while (have < most && (entry = readdir(dir)) != NULL) {
        if (entry->d_name[0] == '.') continue;
        char path[128];
        if (snprintf(path, sizeof path, "%s/%s", folder, entry->d_name) >= (int)sizeof path) continue;
        struct stat info;
        if (lstat(path, &info) != 0) continue;
        if (S_ISDIR(info.st_mode)) have = gather(path, paths, most, have);
        else if (S_ISREG(info.st_mode)) strcpy(paths[have++], path);
    }
    closedir(dir);
    return have;
}

int each_file(const char *folder, char paths[][128], int most) {
    int n = gather(folder, paths, most, 0);
    qsort(paths, (size_t)n, 128, by_name);
    return n;
}

void make_home(void) { mkdir(DATA "/.cache", 0755), mkdir(HOME, 0755); }

void remove_tree(const char *path) {
    const char *const argv[] = {"rm", "-rf", path, NULL};
    run(argv);
}
