/* Arrival of a payload, eight routines of infection that differ in mechanism, and how waiting malware keeps in touch. */
#define _GNU_SOURCE
#include "guest.h"
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int is(const char *a, const char *b) { return strcmp(a, b) == 0; }

static double begun, whole; /* start of the routine in ms, and its planned length in ms */

static void until(double share) { nap_ms(begun + whole * share - (double)now_ms()); }

static long fetch(const struct job *job, long bytes, const char *save, double pace_s) { /* from its server, else from another */
    char path[64];
    snprintf(path, sizeof path, "/bytes/%ld", bytes);
    double rate = pace_s > 0 ? (double)bytes / pace_s : 0;
    if (role_get(job, "c2", path, save, rate) >= bytes) return bytes;
    return role_get(job, "web", path, save, rate);
}

static void fetch_or_write(const struct job *job, long bytes, const char *save, double pace_s) {
    if (fetch(job, bytes, save, pace_s) < bytes) write_file(save, bytes, 0);
}

void arrive(const struct job *job, double pace) {
    long bytes = (long)(knob(job, "payload_kib", 200) * 1024);
    if (is(word(job, "routine", ""), "memory-only")) { fetch(job, bytes, NULL, pace); return; }
    make_home();
    switch (job->seed % 3) {
    case 0: fetch_or_write(job, bytes, PAYLOAD, pace); break;
    case 1: write_file(PAYLOAD, bytes, 0); break;
    default:
        for (int i = 0; i < 5; i++) {
            char piece[64];
            snprintf(piece, sizeof piece, HOME "/part%d", i);
            write_file(piece, bytes / 5, 0);
            nap_ms(200 * pace);
        }
        write_file(PAYLOAD, bytes, 0);
    }
}

static void run_payload(double ms) {
    read_file(PAYLOAD);
    burn(ms * (0.5 + uniform()), NULL, 0);
}

static void download_run(const struct job *job, double budget) {
    role_get(job, "c2", "/stage", NULL, 0);
    until(0.1);
    fetch_or_write(job, (long)budget, PAYLOAD, whole * 0.5 / 1000);
    chmod(PAYLOAD, 0755);
    until(0.7);
    const char *const check[] = {"sha256sum", PAYLOAD, NULL};
    run(check);
    run_payload(400);
    until(0.9);
    role_post(job, "c2", "/checkin", 400, 0);
}

static void package_like(const struct job *job, double budget) {
    char path[96];
    int packages = 2 + (int)(3 * uniform());
    role_get(job, "update", "/bytes/60000", HOME "/index", 0);
    for (int p = 0; p < packages; p++) {
        fetch_or_write(job, (long)(budget * 0.5 / packages), HOME "/package", whole * 0.2 / packages / 1000);
        for (int k = 0; k < 12; k++) {
            snprintf(path, sizeof path, HOME "/lib%d-%d", p, k);
            write_as(path, (long)(budget * 0.5 / packages / 12), 0, k % 4 == 3 ? TEXT : PACKED);
            const char *const check[] = {"md5sum", path, NULL};
            run(check);
            until((p + 0.3 + 0.05 * k) / packages);
        }
        snprintf(path, sizeof path, HOME "/conf%d", p);
        append_file(path, 3000, TEXT, 100000);
        sync();
        until((p + 1.0) / packages);
    }
}

static void in_pieces(const struct job *job, double budget) {
    char path[96];
    int pieces = 6 + (int)(12 * uniform());
    for (int k = 0; k < pieces; k++) {
        snprintf(path, sizeof path, HOME "/piece%d", k);
        fetch_or_write(job, (long)(budget * 0.5 / pieces), path, 0.3 * whole / 1000 / pieces);
        until(0.8 * (k + 0.5 + 0.4 * uniform()) / pieces);
    }
    for (int k = 0; k < pieces; k++) {
        snprintf(path, sizeof path, HOME "/piece%d", k);
        read_file(path);
        append_file(PAYLOAD, (long)(budget * 0.5 / pieces), PACKED, 1L << 30);
        unlink(path);
    }
    until(0.9);
    const char *const check[] = {"sha256sum", PAYLOAD, NULL};
    run(check);
    run_payload(200);
}

static void build_on_target(const struct job *job, double budget) {
    char source[96], object[96];
    int units = 6 + (int)(14 * uniform());
    (void)job;
    mkdir(HOME "/src", 0755);
    for (int k = 0; k < units; k++) {
        snprintf(source, sizeof source, HOME "/src/unit%d.c", k);
        snprintf(object, sizeof object, HOME "/src/unit%d.o", k);
        write_as(source, 2000 + (long)(30000 * uniform()), 0, CODE);
        const char *const scan[] = {"md5sum", source, NULL};
        run(scan);
        burn(0.25 * whole / units * (0.5 + uniform()), NULL, 0);
        write_file(object, (long)(budget * 0.4 / units), 0);
        until(0.85 * (k + 1) / units);
    }
    write_file(PAYLOAD, (long)(budget * 0.4), 0);
    chmod(PAYLOAD, 0755);
    until(0.92);
    run_payload(300);
}

static void memory_only(const struct job *job, double budget) {
    size_t bytes = (size_t)(budget < 8e6 ? budget : 8e6);
    unsigned char *memory = malloc(bytes);
    if (memory == NULL) give_up();
    for (int k = 0; k < 4; k++) {
        fetch(job, (long)bytes / 4, NULL, whole * 0.1 / 1000);
        fill_random(memory + (size_t)k * (bytes / 4), bytes / 4);
        until(0.18 * (k + 1));
    }
    for (int k = 0; k < 6; k++) {
        burn(0.01 * whole * (0.5 + uniform()), memory, bytes);
        until(0.72 + 0.04 * (k + 1));
    }
    free(memory);
    role_post(job, "c2", "/checkin", 300, 0);
}

static void script_persist(const struct job *job, double budget) {
    char path[96];
    int steps = 8 + (int)(10 * uniform());
    (void)budget;
    mkdir(DATA "/.local", 0755);
    for (int k = 0; k < steps; k++) {
        snprintf(path, sizeof path, k % 2 ? DATA "/.local/start%d" : HOME "/job%d", k);
        write_as(path, 300 + (long)(4000 * uniform()), 0, CODE);
        chmod(path, 0755);
        const char *const look[] = {"ps", NULL};
        const char *const find[] = {"grep", "-c", "phase", path, NULL};
        const char *const list[] = {"ls", "-l", HOME, NULL};
        run(k % 3 == 0 ? look : k % 3 == 1 ? find : list);
        if (k % 4 == 3) sync();
        until(0.9 * (k + 0.3 + 0.6 * uniform()) / steps);
    }
    role_post(job, "c2", "/checkin", 400, 0);
}

static void network_push(const struct job *job, double budget) {
    static const int doors[] = {22, 445, 3389};
    struct link link;
    for (int k = 0; k < 6; k++) { /* attempts at the doors of the own network come first */
        int fd = tcp_open(0x0a000264u + (uint32_t)(random_u64() % 100), doors[k % 3], 200);
        if (fd >= 0) close(fd);
        until(0.03 * (k + 1));
    }
    int is_open = link_open(job, "web", &link) == 0;
    for (int k = 0; is_open && k < 8; k++) { /* a shell: short lines both ways */
        if (link_ask(&link, "SH", 80 + (long)(400 * uniform()), 0) < 0) is_open = 0;
        const char *const look[] = {"ps", NULL};
        if (k % 2) run(look);
        until(0.2 + 0.03 * (k + 1));
    }
    int pieces = 10;
    for (int k = 0; k < pieces; k++) {
        long bytes = (long)(budget / pieces) > 60000 ? 60000 : (long)(budget / pieces);
        for (long left = (long)(budget / pieces); left > 0; left -= bytes)
            if (is_open && link_ask(&link, "PUSH", bytes, bytes) < 0) is_open = 0;
        append_file(PAYLOAD, (long)(budget / pieces), RANDOM, 1L << 30);
        until(0.45 + 0.045 * (k + 1));
    }
    if (is_open) link_close(&link);
    run_payload(300);
}

static void slow_drip(const struct job *job, double budget) {
    char name[96];
    int drops = (int)(whole / 1000 * 1.2) + 4;
    long each = (long)(budget * 0.2 / drops) + 100;
    for (int k = 0; k < drops; k++) {
        if (k % 3) {
            snprintf(name, sizeof name, "%08x%04x.drip.example", (unsigned)random_u64(), k & 0xffff);
            dns(name, 16);
        } else {
            snprintf(name, sizeof name, "/bytes/%ld", each);
            role_get(job, "c2", name, NULL, 0);
        }
        append_file(PAYLOAD, each, PACKED, 1L << 30);
        until(0.9 * (k + 0.3 + 0.7 * uniform()) / drops);
    }
    run_payload(250);
}

static void mixed_routine(const struct job *job, double budget) { /* the one routine of laboratory version 1 */
    double seconds = whole / 1000;
    int steps = 12;
    if (access(PAYLOAD, R_OK) != 0) arrive(job, 1);
    read_file(PAYLOAD);
    mkdir(HOME "/bin", 0755);
    if ((job->seed >> 8) % 4 == 0) { /* resembles a package installation: fetch, unpack, configure */
        char path[64];
        snprintf(path, sizeof path, "/bytes/%ld", (long)(budget / 3));
        role_get(job, "web", path, HOME "/bundle", budget / 3 / (seconds / 4 + 0.1));
        steps = 8;
    }
    for (int i = 0; i < steps; i++) {
        char path[96];
        snprintf(path, sizeof path, HOME "/bin/mod%02d", i);
        write_file(path, (long)(budget * (steps == 8 ? 0.6 : 0.9) / steps), 0);
        burn(50 + 200 * uniform(), NULL, 0); /* cost of unpacking */
        const char *const pack[] = {"gzip", "-c", path, NULL};
        if (i % 3 == 0) run(pack);
        if (i % 4 == 1) dns("update.example", 1);
        if (i % 4 == 3) { snprintf(path, sizeof path, HOME "/cron.%d", i); write_file(path, 512, 0); sync(); }
        nap_ms(1000 * seconds / steps * (0.6 + 0.6 * uniform()));
    }
    role_post(job, "web", "/checkin", 400, 0);
}

void infect(const struct job *job, double seconds) {
    const char *routine = word(job, "routine", "");
    double budget = knob(job, "infect_mb", 2) * 1e6;
    begun = (double)now_ms(), whole = 1000 * seconds;
    make_home();
    if (*routine == 0) mixed_routine(job, budget);
    else if (is(routine, "download-run")) download_run(job, budget);
    else if (is(routine, "package-like")) package_like(job, budget);
    else if (is(routine, "in-pieces")) in_pieces(job, budget);
    else if (is(routine, "build-on-target")) build_on_target(job, budget);
    else if (is(routine, "memory-only")) memory_only(job, budget);
    else if (is(routine, "script-persist")) script_persist(job, budget);
    else if (is(routine, "network-push")) network_push(job, budget);
    else if (is(routine, "slow-drip")) slow_drip(job, budget);
    else give_up();
    if (!is(routine, "memory-only")) sync();
    until(1); /* the pauses above have the right length only on average */
}

void keep_in_touch(const struct job *job, const char *form) {
    double period = knob(job, "heartbeat_s", 15);
    struct link link = {.fd = -1};
    if (is(form, "none")) return;
    for (;;) {
        nap_ms(1000 * (is(form, "jitter") ? period * (0.2 + 1.6 * uniform()) : exponential(period)));
        if (is(form, "dns")) dns("status.example", 1);
        else if (is(form, "long-poll")) {
            char path[64];
            snprintf(path, sizeof path, "/wait/%d", 2 + (int)period);
            role_get(job, "c2", path, NULL, 0);
        } else if (is(form, "jitter")) {
            if (link.fd < 0 && link_open(job, "c2", &link) != 0) link.fd = -1;
            if (link.fd >= 0 && link_ask(&link, "ALIVE", 60, 0) < 0) link_close(&link);
        } else role_get(job, "c2", "/beacon", NULL, 0);
    }
}
