/* The guest agent: once a second one JSON object per line with counters of the guest. Only oracle channels use it. */
#define _GNU_SOURCE
#include "guest.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char text[32768];

static const char *load(int fd) { /* the files stay open, so a reading costs one pread each */
    long n = pread(fd, text, sizeof text - 1, 0);
    text[n > 0 ? n : 0] = 0;
    return text;
}

static long long after(const char *where, const char *key) {
    const char *at = strstr(where, key);
    return at ? atoll(at + strlen(key)) : 0;
}

void play_agent(const char *port) {
    int out = open(port, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
    int stat = open("/proc/stat", O_RDONLY), vm = open("/proc/vmstat", O_RDONLY), mem = open("/proc/meminfo", O_RDONLY);
    int disk = open("/proc/diskstats", O_RDONLY), up = open("/proc/uptime", O_RDONLY);
    for (uint64_t due = now_ms();; due += 1000) {
        long long cpu[8] = {0}, total = 0, written = 0;
        const char *at = load(stat);
        sscanf(at, "cpu %lld %lld %lld %lld %lld %lld %lld %lld", cpu, cpu + 1, cpu + 2, cpu + 3, cpu + 4, cpu + 5, cpu + 6, cpu + 7);
        for (int i = 0; i < 8; i++) total += cpu[i];
        long long ctxt = after(at, "\nctxt "), forks = after(at, "\nprocesses "), running = after(at, "\nprocs_running ");
        long long faults = after(load(vm), "\npgfault ");
        at = load(mem);
        long long dirty = after(at, "\nDirty:"), free_kb = after(at, "\nMemFree:"), cached = after(at, "\nCached:");
        for (const char *line = load(disk); line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
            char name[32];
            long long sectors;
            if (sscanf(line, " %*d %*d %31s %*d %*d %*d %*d %*d %*d %lld", name, &sectors) == 2 && strncmp(name, "vd", 2) == 0) written += sectors * 512;
        }
        double uptime = atof(load(up));
        char row[512];
        int n = snprintf(row, sizeof row,
            "{\"up_ns\":%lld,\"cpu_user_jiffies\":%lld,\"cpu_sys_jiffies\":%lld,\"cpu_total_jiffies\":%lld,\"ctxt\":%lld,\"forks\":%lld,\"pgfault\":%lld,"
            "\"disk_wr_bytes\":%lld,\"procs_running\":%lld,\"mem_dirty_bytes\":%lld,\"mem_free_bytes\":%lld,\"mem_cached_bytes\":%lld}\n",
            (long long)(uptime * 1e9), cpu[0] + cpu[1], cpu[2] + cpu[5] + cpu[6], total, ctxt, forks, faults, written, running, dirty * 1024, free_kb * 1024, cached * 1024);
        /* A row that cannot be written now is dropped. If it were kept, it would arrive later with a wrong time. */
        if (write(out, row, (size_t)n) != n && errno != EAGAIN) return;
        if (now_ms() > due + 1000) due = now_ms() - 1000; /* ticks missed in a stall are skipped */
        nap_ms((double)(due + 1000) - (double)now_ms());
    }
}
