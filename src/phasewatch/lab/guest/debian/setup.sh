#!/bin/sh
# Turn a fresh debootstrap tree into the root disk of the Debian guest. Argument: the tree.
set -eu
root=$1

# Nothing may wake the guest but its workloads: no package timers, no time synchronisation, no consoles.
for unit in apt-daily.timer apt-daily-upgrade.timer cron.service dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
  exim4-base.timer exim4.service fstrim.timer getty@tty1.service getty.target logrotate.timer nginx.service \
  plocate-updatedb.timer postgresql.service redis-server.service serial-getty@ttyS0.service sysstat.service \
  sysstat-collect.timer sysstat-summary.timer systemd-binfmt.service systemd-journal-flush.service \
  systemd-logind.service systemd-machine-id-commit.service systemd-pstore.service systemd-random-seed.service \
  systemd-remount-fs.service systemd-sysctl.service systemd-tmpfiles-clean.timer systemd-update-utmp.service \
  systemd-update-utmp-runlevel.service systemd-user-sessions.service proc-sys-fs-binfmt_misc.automount \
  dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount \
  sys-fs-fuse-connections.mount kmod-static-nodes.service systemd-fsck-root.service systemd-hwdb-update.service \
  systemd-modules-load.service systemd-tmpfiles-setup.service systemd-tmpfiles-setup-dev.service \
  vmtouch.service modprobe@.service systemd-firstboot.service systemd-sysusers.service systemd-boot-system-token.service; do
  ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
mkdir -p "$root/etc/systemd/system-generators" "$root/etc/systemd/system.conf.d" "$root/etc/systemd/journald.conf.d"
for generator in "$root/usr/lib/systemd/system-generators/"*; do
  ln -sf /dev/null "$root/etc/systemd/system-generators/${generator##*/}"
done
printf '[Manager]\nShowStatus=no\nLogLevel=warning\n' >"$root/etc/systemd/system.conf.d/lab.conf"
printf '[Journal]\nStorage=volatile\nRuntimeMaxUse=4M\n' >"$root/etc/systemd/journald.conf.d/lab.conf"
printf 'debian\n' >"$root/etc/hostname"
printf '0123456789abcdef0123456789abcdef\n' >"$root/etc/machine-id"
printf '127.0.0.1 localhost debian\n' >"$root/etc/hosts"
printf 'nameserver 10.0.2.3\noptions timeout:2 attempts:1\n' >"$root/etc/resolv.conf"
: >"$root/etc/fstab"
rm -f "$root/etc/cron.d/"* "$root/etc/cron.daily/"*

# The driver and the kinds come from the initramfs, so that they can change without a new root disk.
rm -rf "$root/usr/lib/phasewatch"
ln -s /run/phasewatch "$root/usr/lib/phasewatch"
ln -sf usr/sbin/init "$root/init"
mkdir -p "$root/data" "$root/rom"
cat >"$root/etc/systemd/system/phasewatch-driver.service" <<'UNIT'
[Unit]
Description=Driver of the phasewatch lab
After=multi-user.target

[Service]
ExecStart=/usr/lib/phasewatch/guest
Environment=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/data/.local/home LANG=C.UTF-8
TasksMax=256
OOMPolicy=continue
StandardError=journal+console

[Install]
WantedBy=multi-user.target
UNIT
mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
ln -sf ../phasewatch-driver.service "$root/etc/systemd/system/multi-user.target.wants/phasewatch-driver.service"
ln -sf /lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"

# Exim delivers into one maildir; it takes no other configuration file without giving up its rights.
cat >"$root/etc/exim4/exim4.conf" <<'EXIM'
spool_directory = /data/work/mail-queue/spool
log_file_path = /data/work/mail-queue/log/%slog
primary_hostname = debian.example
qualify_domain = debian.example
host_lookup =
begin routers
all:
  driver = accept
  transport = box
begin transports
box:
  driver = appendfile
  directory = /data/work/mail-queue/mail/box
  maildir_format
  user = mail
  group = mail
begin retry
* * F,1h,1m
EXIM

# A cluster that the kinds copy to the scratch disk: initdb takes half a minute in an emulated guest.
chroot "$root" /bin/sh -c 'rm -rf /var/lib/postgresql/15 /etc/postgresql/15 && mkdir -p /var/lib/lab && chown postgres /var/lib/lab &&
  setpriv --reuid=postgres --regid=postgres --clear-groups \
  /usr/lib/postgresql/15/bin/initdb -D /var/lib/lab/pg --no-locale -E UTF8 -A trust -k --no-sync >/dev/null'

# What no workload needs: documents, translations, PostgreSQL's JIT compiler, link-time optimisation, sanitizers.
rm -rf "$root/usr/share/doc" "$root/usr/share/man" "$root/usr/share/info" "$root/usr/share/locale" \
  "$root/usr/share/i18n" "$root/usr/share/lintian" "$root/usr/share/postgresql/15/man" "$root/var/cache/apt" "$root/var/lib/apt/lists" \
  "$root/var/log/"* "$root/usr/lib/postgresql/15/lib/bitcode" "$root/usr/lib/postgresql/15/lib/llvmjit"* \
  "$root/usr/lib/x86_64-linux-gnu/libLLVM"* "$root/usr/lib/x86_64-linux-gnu/libz3"* "$root/usr/lib/gcc/x86_64-linux-gnu/12/lto1" \
  "$root/usr/lib/x86_64-linux-gnu/libasan"* \
  "$root/usr/lib/x86_64-linux-gnu/libtsan"* "$root/usr/lib/x86_64-linux-gnu/liblsan"* \
  "$root/usr/lib/x86_64-linux-gnu/libubsan"* "$root/usr/lib/gcc/x86_64-linux-gnu/12/"lib?san*.a
mkdir -p "$root/var/cache/apt/archives/partial" "$root/var/lib/apt/lists/partial"
