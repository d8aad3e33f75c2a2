/* The benign loads of laboratory version 2: what people and services do, with files of every kind of content. */
#define _GNU_SOURCE
#include "guest.h"
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MOST 1024
#define WORK DATA "/work"
static char paths[MOST][128];

static int is(const char *a, const char *b) { return strcmp(a, b) == 0; }

int knows_daily(const char *kind) {
    static const char *const known[] = {"idle-timers", "idle-lookups", "browse", "idle-cron", "spreadsheet", "archive", "encrypt-files", "photo-import", "stream-video", "virus-scan", "sync-folders", "index-build", "software-update", "chat", "monitor-agent", "name-lookups", "inventory-scan", "compact-database", "video-encode", "memory-cache", "mail", "ledger", "batch-report", "log-shipper", "thumbnails", "test-suite"};
    for (size_t at = 0; at < sizeof known / sizeof *known; at++)
        if (is(known[at], kind)) return 1;
    return 0;
}

static const char *in_work(const char *name, uint64_t number) {
    static char path[4][96];
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(path[turn], sizeof path[0], WORK "/%s%llu", name, (unsigned long long)number);
    return path[turn];
}

static const char *bytes_url(long bytes) {
    static char url[48];
    snprintf(url, sizeof url, "/bytes/%ld", bytes);
    return url;
}

static long save_over(const char *path, long bytes, enum content content) { /* as editors save: a new file, synced, renamed */
    char fresh[112];
    snprintf(fresh, sizeof fresh, "%s.new", path);
    write_as(fresh, bytes, 0, content);
    int fd = open(fresh, O_RDONLY);
    if (fd >= 0) fsync(fd), close(fd);
    rename(fresh, path);
    return bytes;
}

static void run_short(int many) {
    static const char *const programs[][4] = {{"ps", NULL}, {"md5sum", "/init", NULL}, {"ls", "-l", DATA, NULL}, {"grep", "-c", "x", "/init"}};
    for (int k = 0; k < many; k++) {
        const char *const *one = programs[random_u64() % 3];
        run(one);
    }
}

static const char *next_file(int n, uint64_t turn) {
    const char *path = n > 0 ? paths[turn % (uint64_t)n] : "/init";
    cool(path);
    return path;
}

void play_daily(const struct job *job, const char *kind) {
    double rate = knob(job, "rate_kbps", 300) * 1000, period = knob(job, "period_s", 5), duty = knob(job, "duty", 0.5);
    double hertz = knob(job, "rate_hz", 2), pause = knob(job, "pause_s", 5), piece = knob(job, "piece_kib", 100) * 1024;
    size_t table = (size_t)(knob(job, "mem_mib", 8) * 1048576);
    unsigned char *memory = is(kind, "memory-cache") ? malloc(table) : NULL;
    struct link link = {.fd = -1};
    int n = each_file(CORPUS, paths, MOST);
    uint64_t place = random_u64();
    char line[320];
    if (memory != NULL) fill_random(memory, table);
    for (uint64_t turn = 0;; turn++, place++) {
        double begun = (double)now_ms(), done = 0;
        if (is(kind, "idle-timers")) { nap_ms(80 + 320 * uniform()); burn(1, NULL, 0); continue; }
        if (is(kind, "idle-lookups")) {
            nap_ms(1000 * exponential(25));
            snprintf(line, sizeof line, "host%d.example", (int)(random_u64() % 40));
            dns(line, 1);
            continue;
        }
        if (is(kind, "idle-cron")) {
            nap_ms(1000 * exponential(30));
            run_short(1);
            append_file(WORK "/cron.log", 500, TEXT, 100000);
            continue;
        }
        if (is(kind, "browse")) {
            for (int k = 5 + (int)(20 * uniform()); k > 0; k--) {
                long bytes = 2000 + (long)(80000 * uniform() * uniform());
                if (uniform() < 0.2) snprintf(line, sizeof line, "host%d.example", (int)(random_u64() % 40)), dns(line, 1);
                role_get(job, "web", bytes_url(bytes), in_work("cache", random_u64() % 64), 0);
                done += (double)bytes;
            }
            for (int k = 0; k < 6; k++) { long got = read_file(in_work("cache", random_u64() % 64)); done += got > 0 ? (double)got : 0; }
            done += (double)append_file(WORK "/history", 20000 + (long)(200000 * uniform()), MIXED, 4 << 20);
            nap_ms(1000 * exponential(period));
        } else if (is(kind, "spreadsheet")) {
            for (int k = 1 + (int)(4 * uniform()); k > 0; k--) { long got = read_file(next_file(n, random_u64())); done += got > 0 ? (double)got : 0; }
            burn(100 + 500 * uniform(), NULL, 0);
            done += (double)save_over(in_work("book", turn % 8), 200000 + (long)(1800000 * uniform() * uniform()), PACKED);
            nap_ms(1000 * exponential(period));
        } else if (is(kind, "archive")) {
            int at = snprintf(line, sizeof line, "cat");
            struct stat info;
            for (int k = 0; k < 3; k++) {
                const char *path = next_file(n, random_u64());
                if (stat(path, &info) == 0) done += 1.5 * (double)info.st_size;
                at += snprintf(line + at, sizeof line - (size_t)at, " %.60s", path);
            }
            snprintf(line + at, sizeof line - (size_t)at, " | gzip -c > " WORK "/set%d.gz", (int)(turn % 10));
            const char *const pack[] = {"sh", "-c", line, NULL};
            run(pack);
            if (uniform() < 0.3) unlink(in_work("copy", random_u64() % 40));
            else write_as(in_work("copy", random_u64() % 40), 30000, 0, MIXED);
        } else if (is(kind, "encrypt-files")) {
            struct stat info;
            const char *path = next_file(n, place);
            if (stat(path, &info) != 0) { n = each_file(CORPUS, paths, MOST); nap_ms(100); continue; }
            done = (double)info.st_size;
            if (job->seed % 2) scramble(path, 0, (long)info.st_size, 16384);
            else replace_file(path, 0);
            if (turn % 60 == 59) sync();
        } else if (is(kind, "photo-import")) {
            long bytes = 500000 + (long)(3500000 * uniform());
            const char *path = in_work("photo", turn % 12);
            write_as(path, bytes, rate * 2, PACKED);
            burn(80 + 120 * uniform(), NULL, 0);
            done = (double)bytes + (double)read_file(path);
            write_as(in_work("preview", turn % 60), 10000 + (long)(30000 * uniform()), 0, PACKED);
            nap_ms(1000 * exponential(period));
        } else if (is(kind, "stream-video")) {
            long bytes = 300000 + (long)(1500000 * uniform());
            if (role_get(job, "web", bytes_url(bytes), WORK "/stream", rate) < 0) nap_ms(1000);
            burn(60, NULL, 0);
            read_file(WORK "/stream");
            done = (double)bytes * 0.2;
        } else if (is(kind, "virus-scan")) {
            const char *path = next_file(n, place), *const digest[] = {"sha256sum", path, NULL};
            struct stat info;
            if (stat(path, &info) == 0) done = (double)info.st_size;
            run(digest);
            if (turn % 40 == 39) append_file(WORK "/scan.log", 400, TEXT, 100000);
        } else if (is(kind, "sync-folders")) {
            for (int k = 0; k < 5; k++) {
                long mine = read_file(next_file(n, random_u64())), theirs = read_file(in_work("copy", random_u64() % 40));
                done += (double)(mine > 0 ? mine : 0) + (double)(theirs > 0 ? theirs : 0);
                if (uniform() < 0.35 && mine > 0) done += (double)mine, write_as(in_work("copy", random_u64() % 40), mine, 0, MIXED);
            }
            if (turn % 8 == 7) nap_ms(1000 * exponential(period));
        } else if (is(kind, "index-build")) {
            for (int k = 0; k < 6; k++) { long got = read_file(next_file(n, place * 6 + (uint64_t)k)); done += got > 0 ? (double)got : 0; }
            burn(60 * uniform(), NULL, 0);
            done += (double)save_over(in_work("index", turn % 6), 60000 + (long)(400000 * uniform()), TEXT);
        } else if (is(kind, "software-update")) {
            role_get(job, "update", "/status", NULL, 0);
            if (uniform() < 0.4) {
                long bytes = (long)(piece * (0.5 + uniform()));
                const char *path = in_work("update", turn % 4), *const check[] = {"sha256sum", path, NULL};
                if (role_get(job, "update", bytes_url(bytes), path, 0) <= 0) write_as(path, bytes, 0, PACKED);
                run(check);
                for (int k = 0; k < 10; k++) write_as(in_work("lib", (uint64_t)k), bytes / 20, 0, PACKED);
                rename(path, WORK "/program");
                sync();
            }
            nap_ms(1000 * period * (0.5 + uniform()));
            continue;
        } else if (is(kind, "chat")) {
            if (turn % 5 == 4) { snprintf(line, sizeof line, "/wait/%d", 1 + (int)period); role_get(job, "web", line, NULL, 0); continue; }
            if (link.fd < 0 && link_open(job, "web", &link) != 0) link.fd = -1;
            if (link.fd >= 0 && link_ask(&link, "SAY", 60 + (long)(200 * uniform()), 60) < 0) link_close(&link);
            nap_ms(1000 * exponential(period));
            continue;
        } else if (is(kind, "monitor-agent")) {
            run_short(3);
            role_post(job, "monitoring", "/report", 500 + (long)(3500 * uniform()), 0);
            append_file(WORK "/agent.log", 300, TEXT, 100000);
            nap_ms(1000 * period);
            continue;
        } else if (is(kind, "name-lookups")) {
            snprintf(line, sizeof line, uniform() < 0.2 ? "host%d.gone.example" : "host%d.example", (int)(random_u64() % 400));
            dns(line, 1);
            nap_ms(1000 * exponential(1 / hertz) - ((double)now_ms() - begun));
            continue;
        } else if (is(kind, "inventory-scan")) {
            static const int ports[] = {22, 80, 443, 445, 3389, 9100};
            int fd = tcp_open(0x0a000264u + (uint32_t)(turn / 6 % 100), ports[turn % 6], 150);
            if (fd >= 0) close(fd);
            nap_ms(1000 * exponential(1 / hertz) - ((double)now_ms() - begun));
            if (turn % 48 == 47) nap_ms(1000 * exponential(pause));
            continue;
        } else if (is(kind, "compact-database")) {
            long bytes = 2000000 + (long)(6000000 * uniform()), got = read_file(WORK "/base");
            write_as(WORK "/base.new", bytes, rate, MIXED);
            rename(WORK "/base.new", WORK "/base");
            sync();
            done = got > 0 ? (double)got * 0.3 : 0;
            nap_ms(1000 * exponential(period));
        } else if (is(kind, "video-encode")) {
            for (int k = 0; k < 4; k++) { long got = read_file(next_file(n, place * 4 + (uint64_t)k)); done += got > 0 ? (double)got : 0; }
            burn(400 * duty, NULL, 0);
            nap_ms(400 * (1 - duty));
            done += (double)append_file(WORK "/film", (long)(done / 3), PACKED, 16 << 20);
        } else if (is(kind, "memory-cache")) {
            double slice = 100 * (0.5 + uniform());
            burn(slice * duty, memory, memory ? table : 0);
            nap_ms(slice * (1 - duty));
            continue;
        } else if (is(kind, "mail")) {
            for (int k = 1 + (int)(4 * uniform()); k > 0; k--) {
                long bytes = (long)(piece * uniform()) + 1000;
                role_get(job, "web", bytes_url(bytes), NULL, 0);
                append_file(WORK "/mbox", bytes, TEXT, 8 << 20);
            }
            if (uniform() < 0.3) role_post(job, "web", "/send", (long)(piece * uniform()), 0);
            nap_ms(1000 * exponential(period));
            continue;
        } else if (is(kind, "ledger")) {
            append_file(WORK "/ledger", 200 + (long)(1800 * uniform()), TEXT, 4 << 20);
            nap_ms(1000 * exponential(1 / hertz) - ((double)now_ms() - begun));
            continue;
        } else if (is(kind, "batch-report")) {
            if (link.fd < 0 && link_open(job, "database", &link) != 0) link.fd = -1;
            for (int k = 0; k < 12 && link.fd >= 0; k++) if (link_ask(&link, "ROWS", 8000, 8000) < 0) link_close(&link);
            burn(150 * uniform(), NULL, 0);
            save_over(in_work("report", turn % 6), 50000 + (long)(200000 * uniform()), TEXT);
            role_post(job, "web", "/report", (long)(rate * (1 + uniform())), rate);
            nap_ms(1000 * exponential(period));
            continue;
        } else if (is(kind, "log-shipper")) {
            append_file(WORK "/ship.log", (long)piece, TEXT, 2 << 20);
            const char *const pack[] = {"sh", "-c", "gzip -c " WORK "/ship.log > " WORK "/ship.gz", NULL};
            run(pack);
            role_post(job, "monitoring", "/logs", (long)(piece * (0.8 + 0.4 * uniform())), 0);
            nap_ms(1000 * period);
            continue;
        } else if (is(kind, "thumbnails")) {
            long got = read_file(next_file(n, place));
            burn(80 * duty, NULL, 0);
            nap_ms(80 * (1 - duty));
            write_as(in_work("thumb", turn % 200), 5000 + (long)(35000 * uniform()), 0, PACKED);
            done = got > 0 ? (double)got : 0;
        } else if (is(kind, "test-suite")) {
            for (int k = 5 + (int)(20 * uniform()); k > 0; k--) {
                const char *path = in_work("test", random_u64() % 40), *const look[] = {"grep", "-c", "x", path, NULL};
                write_as(path, 500 + (long)(6000 * uniform()), 0, CODE);
                run(look);
            }
            run_short(2);
            nap_ms(1000 * exponential(period));
            continue;
        } else give_up();
        nap_ms(1000 * done / rate - ((double)now_ms() - begun));
    }
}
