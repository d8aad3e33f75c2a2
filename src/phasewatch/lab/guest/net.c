/* Small clients: TCP, HTTP/1.0, DNS, NTP. They reach only the sink on the host. */
#define _GNU_SOURCE
#include "guest.h"
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static struct sockaddr_in address(uint32_t ip, int port) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(ip)};
    return to;
}

int tcp_open(uint32_t ip, int port, int timeout_ms) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    struct sockaddr_in to = address(ip, port);
    if (connect(fd, (struct sockaddr *)&to, sizeof to) != 0 && errno != EINPROGRESS) { close(fd); return -1; }
    struct pollfd wait = {fd, POLLOUT, 0};
    int ready = poll(&wait, 1, timeout_ms), error = 0;
    socklen_t size = sizeof error;
    getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (ready <= 0 || error != 0) { close(fd); return ready <= 0 ? -2 : -1; }
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
    struct timeval patience = {30, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    return fd;
}

/* ---- the servers of an episode ---- */

static uint32_t name_server = 0x0a000203u, time_server = 0x0a000204u;

static int find_server(const struct job *job, const char *role, uint32_t *ip, int *port) { /* whether the episode has one */
    unsigned a, b, c, d;
    char name[24];
    snprintf(name, sizeof name, "at.%s", role);
    if (sscanf(word(job, name, ""), "%3u.%3u.%3u.%3u:%5d", &a, &b, &c, &d, port) != 5) return 0;
    *ip = a << 24 | b << 16 | c << 8 | d;
    return 1;
}

void use_servers(const struct job *job) {
    int port;
    find_server(job, "dns", &name_server, &port);
    find_server(job, "ntp", &time_server, &port);
}

long link_send(struct link *link, const void *data, long bytes) {
    static unsigned char record[5 + 8192];
    const unsigned char *from = data;
    if (!link->tls) return write(link->fd, data, (size_t)bytes);
    for (long left = bytes; left > 0;) { /* looks like TLS records; nothing is encrypted */
        long n = left < 8192 ? left : 8192;
        record[0] = 23, record[1] = 3, record[2] = 3, record[3] = (unsigned char)(n >> 8), record[4] = (unsigned char)n;
        for (long i = 0; i < n; i++) record[5 + i] = from[i] ^ 0x5a;
        if (write(link->fd, record, (size_t)n + 5) != n + 5) return -1;
        from += n, left -= n;
    }
    return bytes;
}

static long receive(struct link *link, long most) { /* up to `most` bytes; fewer if the server ends or is silent */
    static char block[8192];
    long total = 0, got;
    while (total < most && (got = read(link->fd, block, most - total < (long)sizeof block ? (size_t)(most - total) : sizeof block)) > 0) total += got;
    return total;
}

int link_open(const struct job *job, const char *role, struct link *link) {
    static uint64_t looked_up; /* a name is kept for a minute */
    char key[32];
    uint32_t ip = WEB;
    int port = strcmp(role, "exfil") == 0 || strcmp(role, "update") == 0 || strcmp(role, "web") == 0 ? 80 : 8080;
    int has_world = find_server(job, role, &ip, &port);
    snprintf(key, sizeof key, "name.%s", role);
    const char *name = word(job, key, "");
    if (*name && (looked_up == 0 || now_ms() > looked_up + 60000)) {
        if (dns(name, 1) == 0) return -3;
        looked_up = now_ms();
    }
    link->tls = 0;
    link->fd = tcp_open(ip, port, 5000);
    if (link->fd < 0) return link->fd;
    if (has_world && (port == 443 || port == 8443)) {
        unsigned char hello[520];
        long n = 200 + (long)(300 * uniform());
        fill_random(hello, sizeof hello);
        hello[0] = 22, hello[1] = 3, hello[2] = 1, hello[3] = (unsigned char)(n >> 8), hello[4] = (unsigned char)n;
        if (write(link->fd, hello, (size_t)n + 5) != n + 5 || receive(link, 3205) != 3205) { close(link->fd); return -1; }
        link->tls = 1;
    }
    return 0;
}

long link_ask(struct link *link, const char *verb, long bytes, long reply) {
    char line[64];
    int n = snprintf(line, sizeof line, "%s %ld\n", verb, bytes);
    if (link_send(link, line, n) < 0) return -1;
    return reply <= 0 ? 0 : receive(link, reply) == reply ? reply : -1;
}

void link_close(struct link *link) {
    if (link->fd >= 0) close(link->fd);
    link->fd = -1;
}

static long take_answer(struct link *link, const char *save, double bytes_per_s) {
    static char block[8192];
    int out = save ? open(save, O_WRONLY | O_CREAT | O_TRUNC, 0644) : -1;
    long total = 0, got;
    while ((got = read(link->fd, block, sizeof block)) > 0) {
        total += got;
        if (out >= 0 && write(out, block, (size_t)got) != got) give_up();
        if (bytes_per_s > 0) nap_ms(1000.0 * (double)got / bytes_per_s);
    }
    if (out >= 0) close(out);
    return total;
}

long role_get(const struct job *job, const char *role, const char *path, const char *save, double bytes_per_s) {
    char head[256];
    struct link link;
    int failed = link_open(job, role, &link);
    if (failed) return failed;
    int n = snprintf(head, sizeof head, "GET %s HTTP/1.0\r\nHost: web\r\n\r\n", path);
    long total = link_send(&link, head, n) < 0 ? -1 : take_answer(&link, save, bytes_per_s);
    link_close(&link);
    return total;
}

long role_post(const struct job *job, const char *role, const char *path, long bytes, double bytes_per_s) {
    static char block[8192];
    struct link link;
    int failed = link_open(job, role, &link);
    if (failed) return failed;
    int n = snprintf(block, sizeof block, "POST %s HTTP/1.0\r\nHost: web\r\nContent-Length: %ld\r\n\r\n", path, bytes);
    long sent = link_send(&link, block, n) < 0 ? -1 : 0;
    while (sent >= 0 && sent < bytes) {
        long size = bytes - sent < (long)sizeof block ? bytes - sent : (long)sizeof block;
        fill_random(block, (size_t)size);
        if (link_send(&link, block, size) < 0) { sent = -1; break; }
        sent += size;
        if (bytes_per_s > 0) nap_ms(1000.0 * (double)size / bytes_per_s);
    }
    if (sent >= 0) take_answer(&link, NULL, 0);
    link_close(&link);
    return sent;
}

/* ---- the fixed network ---- */

long http_get(uint32_t ip, int port, const char *path, const char *save, double bytes_per_s) {
    static char block[8192];
    int fd = tcp_open(ip, port, 5000);
    if (fd < 0) return -1;
    int n = snprintf(block, sizeof block, "GET %s HTTP/1.0\r\nHost: web\r\n\r\n", path);
    if (write(fd, block, (size_t)n) != n) { close(fd); return -1; }
    int out = save ? open(save, O_WRONLY | O_CREAT | O_TRUNC, 0644) : -1;
    long total = 0, got;
    while ((got = read(fd, block, sizeof block)) > 0) {
        total += got;
        if (out >= 0 && write(out, block, (size_t)got) != got) break;
        if (bytes_per_s > 0) nap_ms(1000.0 * (double)got / bytes_per_s);
    }
    if (out >= 0) close(out);
    close(fd);
    return total;
}

long http_post(uint32_t ip, int port, const char *path, long bytes, double bytes_per_s) {
    static char block[8192];
    int fd = tcp_open(ip, port, 5000);
    if (fd < 0) return -1;
    int n = snprintf(block, sizeof block, "POST %s HTTP/1.0\r\nHost: web\r\nContent-Length: %ld\r\n\r\n", path, bytes);
    long sent = write(fd, block, (size_t)n) == n ? 0 : -1;
    while (sent >= 0 && sent < bytes) {
        size_t size = (size_t)(bytes - sent) < sizeof block ? (size_t)(bytes - sent) : sizeof block;
        fill_random(block, size);
        long done = write(fd, block, size);
        if (done <= 0) break;
        sent += done;
        if (bytes_per_s > 0) nap_ms(1000.0 * (double)done / bytes_per_s);
    }
    while (read(fd, block, sizeof block) > 0) {}
    close(fd);
    return sent;
}

uint32_t dns(const char *name, int type) {
    unsigned char packet[512] = {0};
    uint16_t id = (uint16_t)random_u64();
    packet[0] = (unsigned char)(id >> 8), packet[1] = (unsigned char)id, packet[2] = 1, packet[5] = 1;
    size_t at = 12;
    for (const char *label = name; *label;) {
        size_t size = strcspn(label, ".");
        if (size == 0 || size > 63 || at + size + 6 > sizeof packet) return 0;
        packet[at++] = (unsigned char)size;
        memcpy(packet + at, label, size), at += size;
        label += size + (label[size] == '.');
    }
    packet[at++] = 0, packet[at++] = 0, packet[at++] = (unsigned char)type, packet[at++] = 0, packet[at++] = 1;
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in to = address(name_server, 53);
    sendto(fd, packet, at, 0, (struct sockaddr *)&to, sizeof to);
    struct pollfd wait = {fd, POLLIN, 0};
    uint32_t answer = 0;
    if (poll(&wait, 1, 2000) > 0) {
        long got = recv(fd, packet, sizeof packet, 0);
        if (got >= 16 && type == 1) answer = (uint32_t)packet[got - 4] << 24 | (uint32_t)packet[got - 3] << 16 | (uint32_t)packet[got - 2] << 8 | packet[got - 1];
    }
    close(fd);
    return answer;
}

void ntp(void) {
    unsigned char packet[48] = {0x23};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in to = address(time_server, 123);
    sendto(fd, packet, sizeof packet, 0, (struct sockaddr *)&to, sizeof to);
    struct pollfd wait = {fd, POLLIN, 0};
    if (poll(&wait, 1, 2000) > 0) recv(fd, packet, sizeof packet, 0);
    close(fd);
}
