/* Workloads that are programs of the image: KINDS/NAME, called with SEED phase=PHASE KNOB=VALUE... They come before the built-in ones. */
#define _GNU_SOURCE
#include "guest.h"
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int find(const char *name, char *path, size_t size) {
    if (*name == 0 || *name == '.' || strchr(name, '/') != NULL) return 0;
    return snprintf(path, size, KINDS "/%s", name) < (int)size && access(path, X_OK) == 0;
}

int has_kind(const char *name) {
    char path[192];
    return find(name, path, sizeof path);
}

void become_kind(const struct job *job, const char *name) {
    static char path[192], seed[24], phase[24], knobs[MOST_KNOBS][64];
    const char *argv[MOST_KNOBS + 4] = {path, seed, phase};
    int at = 3;
    if (!find(name, path, sizeof path)) return;
    snprintf(seed, sizeof seed, "%llu", (unsigned long long)job->seed);
    snprintf(phase, sizeof phase, "phase=%s", *job->phase ? job->phase : "clean");
    for (int i = 0; i < job->knobs; i++) {
        snprintf(knobs[i], sizeof knobs[i], "%s=%s", job->knob[i].name, job->knob[i].text);
        argv[at++] = knobs[i];
    }
    int null = open("/dev/null", O_RDWR);
    dup2(null, 0), dup2(null, 1);
    if (chdir(DATA) == 0) execv(path, (char *const *)argv);
}
