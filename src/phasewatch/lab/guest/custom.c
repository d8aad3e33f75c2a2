/* Custom workloads, instead of malware.c: shell scripts under /profile, one per sample and phase. */
#define _GNU_SOURCE
#include "guest.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *script_of(const struct job *job, const char *phase) {
    static char path[128];
    snprintf(path, sizeof path, "/profile/%s/%s/%s", job->profile, job->sample, phase);
    return access(path, R_OK) == 0 ? path : NULL;
}

static int play(const struct job *job, const char *phase) { /* returns whether there is a script */
    const char *script = script_of(job, phase);
    char text[32];
    if (script == NULL) return 0;
    make_home();
    if (chdir(HOME) != 0) return 0;
    snprintf(text, sizeof text, "%llu", (unsigned long long)job->seed);
    setenv("seed", text, 1), setenv("phase", phase, 1), setenv("sample", job->sample, 1);
    for (int i = 0; i < job->knobs; i++) {
        snprintf(text, sizeof text, "%.6g", job->knob[i].value);
        setenv(job->knob[i].name, text, 1);
    }
    const char *const shell[] = {"sh", script, NULL};
    run(shell);
    return 1;
}

int knows_profile(const char *profile, const char *sample) {
    char path[128];
    snprintf(path, sizeof path, "/profile/%s/%s", profile, sample);
    return access(path, R_OK) == 0;
}

static void remove_traces(void) {
    if (chdir("/") == 0) remove_tree(DATA "/.cache");
    remove_tree(DATA "/.local");
    sync();
}

void install_state(const struct job *job) { /* create the state that the first label describes */
    if (strcmp(job->phase, "clean") == 0 || strcmp(job->profile, "benign") == 0) return;
    play(job, "armed");
    if (strcmp(job->phase, "active") == 0 || strcmp(job->phase, "dormant") == 0) play(job, "infecting");
    sync();
}

void play_phase(const struct job *job) {
    if (strcmp(job->phase, "clean") == 0) remove_traces();
    int played = play(job, job->phase);
    /* Only work that ends by itself is reported as finished; the other phases last until the host stops them. */
    if (played && (strcmp(job->phase, "infecting") == 0 || strcmp(job->phase, "active") == 0)) return;
    for (;;) pause();
}
