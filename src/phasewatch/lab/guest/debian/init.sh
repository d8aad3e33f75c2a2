#!/bin/busybox sh
# First process of the Debian guest: modules, disks, network, then systemd.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
# Some modules depend on others; a few passes settle the order.
for pass in 1 2 3 4; do
  for module in /modules/*.ko; do insmod "$module" 2>/dev/null; done
done
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  [ -b /dev/vda ] && [ -b /dev/vdb ] && [ -e /sys/class/net/eth0 ] && break
  sleep 0.1
done
# The root disk is shared by all guests and never written: writes outside /data stay in memory.
mkdir -p /rom /ram /root
mount -t ext4 -o ro,noatime /dev/vdb /rom
mount -t tmpfs -o size=96m,mode=755 ram /ram
mkdir /ram/upper /ram/work
mount -t overlay -o lowerdir=/rom,upperdir=/ram/upper,workdir=/ram/work root /root
mount -t ext4 -o noatime /dev/vda /root/data
mount -t tmpfs -o size=32m,mode=755,nosuid,nodev run /root/run
mkdir -p /root/run/lock /root/data/work /root/data/.cache /root/data/.local/home
cp -a /phasewatch /root/run/phasewatch
echo 500 > /proc/sys/vm/dirty_expire_centisecs
echo 100 > /proc/sys/vm/dirty_writeback_centisecs
ifconfig lo 127.0.0.1 up
ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
route add default gw 10.0.2.2
mount --move /dev /root/dev
mount --move /sys /root/sys
mount --move /proc /root/proc
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec /bin/busybox switch_root -c /dev/console /root /sbin/init
