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
    struct sockaddr_in to = address(0x0a000203u, 53);
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
    struct sockaddr_in to = address(0x0a000204u, 123);
    sendto(fd, packet, sizeof packet, 0, (struct sockaddr *)&to, sizeof to);
    struct pollfd wait = {fd, POLLIN, 0};
    if (poll(&wait, 1, 2000) > 0) recv(fd, packet, sizeof packet, 0);
    close(fd);
}
