/* Declarations of the guest program: time, random numbers, knobs, files, sockets. */
#ifndef PHASEWATCH_GUEST_H
#define PHASEWATCH_GUEST_H
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define DATA "/data"            /* the scratch disk; nothing outside it is written */
#define CORPUS DATA "/docs"     /* the documents of a user */
#define HOME DATA "/.cache/upd" /* the folder of an emulated profile */
#define PAYLOAD HOME "/payload.bin"
#define KINDS "/usr/lib/phasewatch/kinds"
#define MOST_KNOBS 40

struct job {                    /* one command of the host, parsed */
    char verb[16], phase[16], profile[32], sample[32];
    uint64_t seed;
    int knobs;
    struct { char name[24], text[32]; double value; } knob[MOST_KNOBS];
};

double knob(const struct job *job, const char *name, double otherwise);
const char *word(const struct job *job, const char *name, const char *otherwise); /* a knob that is text */

/* kinds.c: programs of the image at KINDS/NAME, which come before what is built in */
int has_kind(const char *name);
void become_kind(const struct job *job, const char *name); /* exec; returns only if that fails */

/* base.c */
uint64_t now_ms(void);
void nap_ms(double ms);
void seed_random(uint64_t seed);
uint64_t random_u64(void);
double uniform(void);                       /* [0, 1) */
double exponential(double mean);            /* at most five means */
void fill_random(void *at, size_t n);
int run(const char *const argv[]);          /* run a busybox applet; returns its exit code */
int write_file(const char *path, long bytes, double bytes_per_s);
long read_file(const char *path);           /* bytes read; -1 if there is no file */
int each_file(const char *folder, char paths[][128], int most); /* regular files below it, sorted, at most `most` */
void make_home(void);
void remove_tree(const char *path);

/* net.c */
int tcp_open(uint32_t ip, int port, int timeout_ms); /* a socket; -1 refused, -2 silent */
long http_get(uint32_t ip, int port, const char *path, const char *save, double bytes_per_s);
long http_post(uint32_t ip, int port, const char *path, long bytes, double bytes_per_s);
uint32_t dns(const char *name, int type);   /* address in host order; 0 without an answer */
void ntp(void);
#define WEB 0x0a000250u                     /* 10.0.2.80 */

/* malware.c, benign.c, agent.c */
int knows_profile(const char *profile, const char *sample);
int knows_load(const char *kind);
void play_phase(const struct job *job);     /* returns when the work has ended by itself */
void install_state(const struct job *job);
void play_load(const struct job *job, const char *kind);
void play_chatter(uint64_t seed, double period_s);
void warm_up(void);
void play_agent(const char *port);
#endif
