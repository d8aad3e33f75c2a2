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
enum content { TEXT, CODE, PACKED, RANDOM, MIXED };
void fill(void *at, size_t n, enum content content);
void give_up(void);                         /* ends this workload with an error: its label would have no act */
void be_cold(double share);                 /* this share of reads comes from the disk, not from the page cache */
void cool(const char *path);
void burn(double ms, unsigned char *memory, size_t bytes); /* computes; over the memory, if there is any */
int run(const char *const argv[]);          /* run a busybox applet; returns its exit code */
int write_file(const char *path, long bytes, double bytes_per_s);
int write_as(const char *path, long bytes, double bytes_per_s, enum content content);
long append_file(const char *path, long bytes, enum content content, long most); /* begins anew after `most` bytes */
void scramble(const char *path, long from, long most, long step); /* XOR in place, one block of each `step` bytes */
long replace_file(const char *path, int keep); /* an encrypted copy beside it; removes the original unless `keep` */
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

/* The servers of an episode: `at.ROLE=ADDRESS:PORT` and `name.ROLE=NAME`, else the web server of the fixed network. */
struct link { int fd, tls; };
void use_servers(const struct job *job);    /* name and time server */
int link_open(const struct job *job, const char *role, struct link *link); /* 0, or -1 refused, -2 silent, -3 no name */
long link_ask(struct link *link, const char *verb, long bytes, long reply); /* one line; bytes received, -1 broken */
long link_send(struct link *link, const void *data, long bytes);
void link_close(struct link *link);
long role_get(const struct job *job, const char *role, const char *path, const char *save, double bytes_per_s);
long role_post(const struct job *job, const char *role, const char *path, long bytes, double bytes_per_s);
#define WEB 0x0a000250u                     /* 10.0.2.80 */

/* routines.c */
void arrive(const struct job *job, double pace);
void infect(const struct job *job, double seconds);
void keep_in_touch(const struct job *job, const char *form); /* armed and dormant; may return */

/* loads.c: the loads of laboratory version 2 */
int knows_daily(const char *kind);
void play_daily(const struct job *job, const char *kind);

/* malware.c, benign.c, agent.c */
int knows_profile(const char *profile, const char *sample);
int knows_load(const char *kind);
void play_phase(const struct job *job);     /* returns when the work has ended by itself */
void install_state(const struct job *job);
void play_load(const struct job *job, const char *kind);
void play_chatter(const struct job *job, double period_s);
void warm_up(const struct job *job);
void play_agent(const char *port);
#endif
