/* The driver: reads commands of the host from a virtio port, acknowledges each, then runs its work in a process group. */
#define _GNU_SOURCE
#include "guest.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum role { PHASE, LOAD, CHATTER, AGENT, ONCE, ROLES };
static pid_t group[ROLES];
static long command_of[ROLES];
static int ctl = -1;
static char tel_path[64];

static long uptime_ms(void) {
    FILE *file = fopen("/proc/uptime", "r");
    double seconds = 0;
    if (file != NULL && fscanf(file, "%lf", &seconds) != 1) seconds = 0;
    if (file != NULL) fclose(file);
    return (long)(seconds * 1000);
}

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void say(const char *format, ...) {
    char line[256];
    __builtin_va_list rest;
    __builtin_va_start(rest, format);
    int n = vsnprintf(line, sizeof line, format, rest);
    __builtin_va_end(rest);
    for (int at = 0; at < n;) {
        long done = write(ctl, line + at, (size_t)(n - at));
        if (done < 0 && errno != EINTR && errno != EAGAIN) return;
        if (done > 0) at += (int)done;
    }
}

static void find_ports(char *ctl_path) {
    for (int attempt = 0; attempt < 100; attempt++, nap_ms(50)) {
        DIR *dir = opendir("/sys/class/virtio-ports");
        struct dirent *entry;
        while (dir != NULL && (entry = readdir(dir)) != NULL) {
            char path[300], name[16] = {0};
            snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
            FILE *file = fopen(path, "r");
            if (file == NULL) continue;
            if (fscanf(file, "%15s", name) == 1) {
                if (strcmp(name, "ctl") == 0) snprintf(ctl_path, 64, "/dev/%.50s", entry->d_name);
                if (strcmp(name, "tel") == 0) snprintf(tel_path, sizeof tel_path, "/dev/%.50s", entry->d_name);
            }
            fclose(file);
        }
        if (dir != NULL) closedir(dir);
        if (*ctl_path && *tel_path) return;
    }
}

static void stop(enum role role) {
    if (group[role] <= 0) return;
    kill(-group[role], SIGKILL);
    waitpid(group[role], NULL, 0);
    group[role] = 0;
}

static void parse(char *rest, struct job *job, const char *form) { /* form: p phase, r profile, s sample or load, n seed */
    char *save = NULL;
    for (char *word = strtok_r(rest, " ", &save); word != NULL; word = strtok_r(NULL, " ", &save)) {
        char *equals = strchr(word, '=');
        if (equals != NULL && job->knobs < MOST_KNOBS) {
            *equals = 0;
            snprintf(job->knob[job->knobs].name, sizeof job->knob[0].name, "%s", word);
            snprintf(job->knob[job->knobs].text, sizeof job->knob[0].text, "%s", equals + 1);
            job->knob[job->knobs++].value = atof(equals + 1);
        } else if (*form) {
            if (*form == 'p') snprintf(job->phase, sizeof job->phase, "%s", word);
            if (*form == 'r') snprintf(job->profile, sizeof job->profile, "%s", word);
            if (*form == 's') snprintf(job->sample, sizeof job->sample, "%s", word);
            if (*form == 'n') job->seed = strtoull(word, NULL, 10);
            form++;
        }
    }
}

static void unblock(void) {
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

static int find_kind(const struct job *job, char *name, size_t size) { /* a load: NAME; a step: PROFILE.SAMPLE.PHASE, or routine.NAME */
    int is_benign = strcmp(job->profile, "benign") == 0;
    if (strcmp(job->verb, "load") == 0 || (strcmp(job->verb, "phase") == 0 && is_benign)) snprintf(name, size, "%s", job->sample);
    else if (strcmp(job->verb, "phase") != 0) return 0;
    else {
        snprintf(name, size, "%s.%s.%s", job->profile, job->sample, job->phase);
        if (!has_kind(name) && strcmp(job->phase, "infecting") == 0) snprintf(name, size, "routine.%s", word(job, "routine", ""));
    }
    return has_kind(name);
}

static void start(enum role role, long id, const struct job *job) {
    stop(role);
    command_of[role] = id;
    pid_t child = fork();
    if (child != 0) { group[role] = child; setpgid(child, child); return; }
    setpgid(0, 0);
    close(ctl);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGCHLD, SIG_DFL);
    unblock();
    seed_random(job->seed + (uint64_t)role);
    be_cold(knob(job, "cold", 0));
    use_servers(job);
    char name[80];
    if (find_kind(job, name, sizeof name)) { become_kind(job, name); _exit(126); }
    if (strcmp(job->verb, "phase") == 0) {
        if (strcmp(job->profile, "benign") == 0 && strcmp(job->phase, "clean") == 0) play_load(job, job->sample);
        play_phase(job);
    } else if (strcmp(job->verb, "load") == 0) play_load(job, job->sample);
    else if (strcmp(job->verb, "install") == 0) install_state(job);
    else if (strcmp(job->verb, "warmup") == 0) warm_up(job);
    else if (strcmp(job->verb, "agent") == 0) play_agent(tel_path);
    _exit(0);
}

static int is_known(const struct job *job) { /* unknown work is refused before the acknowledgement, because that becomes a label */
    static const char *const phases[] = {"clean", "armed", "infecting", "active", "dormant", NULL};
    int at = 0;
    char name[80];
    if (strcmp(job->verb, "load") == 0) return has_kind(job->sample) || knows_load(job->sample);
    while (phases[at] != NULL && strcmp(phases[at], job->phase) != 0) at++;
    if (phases[at] == NULL) return 0;
    if (strcmp(job->profile, "benign") == 0) return strcmp(job->phase, "clean") == 0 && (has_kind(job->sample) || knows_load(job->sample));
    snprintf(name, sizeof name, "%s.%s.active", job->profile, job->sample);
    return has_kind(name) || knows_profile(job->profile, job->sample);
}

static void obey(char *line) {
    char *verb = strchr(line, ' ');
    long id = strtol(line, NULL, 10);
    struct job job = {.seed = 1};
    if (verb == NULL) { say("err %ld no verb\n", id); return; }
    *verb++ = 0;
    char *rest = strchr(verb, ' ');
    if (rest != NULL) *rest++ = 0;
    else rest = verb + strlen(verb);
    snprintf(job.verb, sizeof job.verb, "%s", verb);
    static const char *const known[] = {"hello", "warmup", "chatter", "load", "unload", "install", "phase", "agent", "poweroff", NULL};
    int at = 0;
    while (known[at] != NULL && strcmp(known[at], verb) != 0) at++;
    if (known[at] == NULL) { say("err %ld unknown verb %.20s\n", id, verb); return; }
    if (strcmp(verb, "load") == 0) parse(rest, &job, "sn");
    if (strcmp(verb, "phase") == 0 || strcmp(verb, "install") == 0) parse(rest, &job, "prsn");
    if (strcmp(verb, "warmup") == 0) parse(rest, &job, "");
    if (strcmp(verb, "chatter") == 0) parse(rest, &job, "ns"); /* the mean interval in the place of a sample */
    if ((strcmp(verb, "load") == 0 || *job.phase) && !is_known(&job)) { say("err %ld no such phase, profile, sample or load\n", id); return; }
    say("ack %ld %ld\n", id, uptime_ms());
    if (strcmp(verb, "chatter") == 0) {
        double period = atof(job.sample);
        stop(CHATTER);
        pid_t child = fork();
        if (child == 0) { setpgid(0, 0); close(ctl); signal(SIGPIPE, SIG_IGN); signal(SIGCHLD, SIG_DFL); unblock(); play_chatter(&job, period > 0 ? period : 12); }
        group[CHATTER] = child;
    } else if (strcmp(verb, "load") == 0) start(LOAD, id, &job);
    else if (strcmp(verb, "unload") == 0) stop(LOAD);
    else if (strcmp(verb, "install") == 0) start(ONCE, id, &job);
    else if (strcmp(verb, "warmup") == 0) start(ONCE, id, &job);
    else if (strcmp(verb, "phase") == 0) start(PHASE, id, &job);
    else if (strcmp(verb, "agent") == 0) { if (strcmp(rest, "on") == 0) start(AGENT, id, &job); else stop(AGENT); }
    else if (strcmp(verb, "poweroff") == 0) { sync(); reboot(RB_POWER_OFF); }
}

static void reap(void) {
    int status;
    pid_t child;
    while ((child = waitpid(-1, &status, WNOHANG)) > 0)
        for (int role = 0; role < ROLES; role++)
            if (group[role] == child) {
                group[role] = 0;
                if (role == PHASE || role == ONCE || role == LOAD) say("finished %ld %d\n", command_of[role], WIFEXITED(status) ? WEXITSTATUS(status) : 128);
            }
}

static void child_ended(int signal_number) { (void)signal_number; }

int main(void) {
    struct sigaction action = {.sa_handler = child_ended};
    sigset_t blocked, open_set;
    sigemptyset(&blocked), sigemptyset(&open_set);
    sigaddset(&blocked, SIGCHLD);
    sigaction(SIGCHLD, &action, NULL);
    sigprocmask(SIG_BLOCK, &blocked, NULL); /* otherwise a child that ends just before the wait is reported a second late */
    char ctl_path[64] = {0}, buffer[4096];
    struct utsname system;
    size_t have = 0;
    find_ports(ctl_path);
    ctl = open(ctl_path, O_RDWR | O_CLOEXEC);
    uname(&system);
    say("ready %ld %s\n", uptime_ms(), system.release);
    for (;;) {
        struct pollfd wait = {ctl, POLLIN, 0};
        if (ppoll(&wait, 1, &(struct timespec){1, 0}, &open_set) < 0) wait.revents = 0; /* the end of a child interrupts it */
        reap();
        if (wait.revents & POLLHUP) { nap_ms(100); continue; } /* the host is not connected */
        if (!(wait.revents & POLLIN)) continue;
        long got = read(ctl, buffer + have, sizeof buffer - 1 - have);
        if (got <= 0) continue;
        have += (size_t)got;
        buffer[have] = 0;
        char *line = buffer, *end;
        while ((end = strchr(line, '\n')) != NULL) { *end = 0; obey(line); line = end + 1; }
        have = strlen(line);
        if (have == sizeof buffer - 1) have = 0; /* discard a line that is too long */
        memmove(buffer, line, have + 1);
    }
}
