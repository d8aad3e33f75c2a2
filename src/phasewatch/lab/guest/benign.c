/* Benign loads that resemble the profiles, the rare background events ("chatter") of every guest, and the warm-up. */
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
static volatile uint64_t kept;

static int is(const char *a, const char *b) { return strcmp(a, b) == 0; }

static void busy_ms(double ms) {
    uint64_t until = now_ms() + (uint64_t)ms, h = random_u64();
    while (now_ms() < until)
        for (int i = 0; i < 3000; i++) h = (h ^ (h >> 31)) * 0x94d049bb133111ebull + (uint64_t)i;
    kept = h;
}

static const char *any_file(int n) {
    const char *path = n > 0 ? paths[random_u64() % (uint64_t)n] : "/init";
    cool(path);
    return path;
}

int knows_load(const char *kind) {
    static const char *const known[] = {"idle", "compile", "backup", "poller", "compress", "find-grep", "download", "upload", "hash", "database", "health-checks", "package-install", "render", "log-rotate"};
    for (size_t at = 0; at < sizeof known / sizeof *known; at++)
        if (is(known[at], kind)) return 1;
    return knows_daily(kind);
}

void play_load(const struct job *job, const char *kind) {
    double rate = knob(job, "rate_kbps", 300) * 1000, period = knob(job, "period_s", 5), duty = knob(job, "duty", 0.5);
    int n = each_file(CORPUS, paths, MOST);
    char url[64], path[160];
    mkdir(WORK, 0755);
    if (knows_daily(kind)) play_daily(job, kind);
    for (uint64_t turn = 0;; turn++) {
        double begun = (double)now_ms(), done = 0;
        if (is(kind, "compile")) { /* one process per unit: read, compute, write an object file */
            const char *source = any_file(n);
            const char *const digest[] = {"md5sum", source, NULL};
            run(digest);
            double think = 50 + 400 * uniform();
            busy_ms(think);
            snprintf(path, sizeof path, WORK "/unit%d.o", (int)(turn % 60));
            write_file(path, 4000 + (long)(60000 * uniform()), 0);
            nap_ms(think * (1 / duty - 1));
            continue;
        }
        if (is(kind, "compress")) {
            snprintf(path, sizeof path, "gzip -c %s > " WORK "/packed%d.gz", any_file(n), (int)(turn % 20));
            const char *const pack[] = {"sh", "-c", path, NULL};
            run(pack);
            nap_ms(((double)now_ms() - begun) * (1 / duty - 1));
            continue;
        }
        if (is(kind, "hash")) {
            const char *const digest[] = {"sha256sum", any_file(n), any_file(n), NULL};
            run(digest);
            nap_ms(((double)now_ms() - begun) * (1 / duty - 1));
            continue;
        }
        if (is(kind, "render")) { double slice = 100 * (0.5 + uniform()); busy_ms(slice * duty); nap_ms(slice * (1 - duty)); continue; }
        if (is(kind, "backup")) {
            const char *source = any_file(n);
            snprintf(path, sizeof path, WORK "/copy%d", (int)(turn % 200));
            const char *const copy[] = {"cp", source, path, NULL};
            run(copy);
            struct stat info;
            done = stat(source, &info) == 0 ? (double)info.st_size : 1000;
            if (turn % 50 == 49) sync();
        } else if (is(kind, "find-grep")) {
            const char *const search[] = {"grep", "-c", "phase", any_file(n), any_file(n), any_file(n), NULL};
            run(search);
            nap_ms(1000 * period * 0.2 * uniform());
            continue;
        } else if (is(kind, "database")) {
            int fd = open(WORK "/db", O_RDWR | O_CREAT, 0644);
            char page[4096];
            fill_random(page, sizeof page);
            for (int k = 0; k < 8; k++) if (pwrite(fd, page, sizeof page, (long)(random_u64() % 4000) * 4096) < 0) break;
            fsync(fd);
            close(fd);
            done = 8 * 4096;
        } else if (is(kind, "poller")) {
            role_get(job, "monitoring", "/status", NULL, 0);
            nap_ms(1000 * period);
            continue;
        } else if (is(kind, "download")) {
            long bytes = 200000 + (long)(1800000 * uniform());
            snprintf(url, sizeof url, "/bytes/%ld", bytes);
            snprintf(path, sizeof path, WORK "/get%d", (int)(turn % 6));
            role_get(job, "web", url, path, rate);
            nap_ms(1000 * exponential(period));
            continue;
        } else if (is(kind, "upload")) {
            read_file(any_file(n));
            role_post(job, "web", "/backup", (long)(rate * (2 + 4 * uniform())), rate);
            nap_ms(1000 * exponential(period));
            continue;
        } else if (is(kind, "health-checks")) {
            static const int ports[] = {22, 80, 443, 3306, 5432, 6379, 8080, 9090};
            int fd = tcp_open(0xc6120100u + (uint32_t)(turn % 12), ports[turn / 12 % 8], 200);
            if (fd >= 0) close(fd);
            nap_ms(1000 * period / 12 - ((double)now_ms() - begun));
            continue;
        } else if (is(kind, "package-install")) {
            long bytes = 200000 + (long)(1500000 * uniform());
            snprintf(url, sizeof url, "/bytes/%ld", bytes);
            role_get(job, "update", url, WORK "/package", rate);
            for (int k = 0; k < 15; k++) {
                snprintf(path, sizeof path, WORK "/lib%d", k);
                write_file(path, bytes / 15, 0);
                const char *const check[] = {"md5sum", path, NULL};
                run(check);
                nap_ms(200 * uniform());
            }
            sync();
            nap_ms(1000 * period);
            continue;
        } else if (is(kind, "log-rotate")) {
            write_file(WORK "/log", 100000 + (long)(900000 * uniform()), rate * 2);
            const char *const pack[] = {"gzip", "-f", WORK "/log", NULL};
            run(pack);
            sync();
            nap_ms(1000 * exponential(period));
            continue;
        } else pause(); /* idle */
        nap_ms(1000 * done / rate - ((double)now_ms() - begun));
    }
}

void play_chatter(const struct job *job, double period_s) {
    seed_random(job->seed);
    use_servers(job);
    for (;;) {
        nap_ms(1000 * (0.3 * period_s + exponential(0.7 * period_s)));
        char text[64];
        switch (random_u64() % 6) {
        case 0: snprintf(text, sizeof text, "host%d.example", (int)(random_u64() % 40)); dns(text, 1); break;
        case 1: ntp(); break;
        case 2: case 3: role_get(job, "monitoring", "/status", NULL, 0); break;
        default: {
            int fd = open(DATA "/messages", O_WRONLY | O_CREAT | O_APPEND, 0644);
            char words[300];
            memset(words, 'x', sizeof words);
            if (write(fd, words, 50 + (size_t)(250 * uniform())) > 0) fsync(fd);
            close(fd);
        }
        }
    }
}

void warm_up(const struct job *job) { /* run all code of later phases once, so that nothing runs for the first time under a label */
    static const char *const applets[][4] = {
        {"gzip", "-f", WORK "/w", NULL}, {"sha256sum", "/init", NULL}, {"md5sum", "/init", NULL}, {"ps", NULL},
        {"grep", "-c", "phase", NULL}, {"cp", "/init", WORK "/i", NULL}, {"sh", "-c", "gzip -c /init > " WORK "/z", NULL}, {"rm", "-rf", WORK "/i", NULL},
    };
    mkdir(WORK, 0755);
    make_home();
    for (int round = 0; round < 2; round++) {
        write_file(WORK "/w", 60000, 0);
        for (size_t i = 0; i < sizeof applets / sizeof *applets; i++) run(applets[i]);
        int n = each_file(CORPUS, paths, MOST);
        for (int k = 0; k < 6; k++) read_file(any_file(n));
        http_get(WEB, 80, "/bytes/60000", WORK "/g", 0);
        http_post(WEB, 80, "/p", 30000, 0);
        static const char *const roles[] = {"c2", "pool", "exfil", "update", "database", "monitoring", "web"};
        for (size_t i = 0; i < sizeof roles / sizeof *roles; i++) role_get(job, roles[i], "/status", NULL, 0);
        role_post(job, "web", "/p", 3000, 0);
        append_file(WORK "/w.gz", 20000, TEXT, 1 << 20), replace_file(WORK "/w.gz", 0), scramble(WORK "/w.gz.lck", 0, 20000, 16384);
        http_get(WEB, 8080, "/beacon", NULL, 0);
        dns("warm.example", 1), dns("warm.example", 16), ntp();
        for (int k = 0; k < 12; k++) { int fd = tcp_open(0xc6120001u + (uint32_t)k, 80, 100); if (fd >= 0) close(fd); }
        busy_ms(300);
        int fd = open(WORK "/db", O_RDWR | O_CREAT, 0644);
        if (pwrite(fd, paths, 4096, 0) == 4096) fsync(fd);
        close(fd);
        sync();
    }
    remove_tree(WORK);
    remove_tree(DATA "/.cache");
    sync();
}
