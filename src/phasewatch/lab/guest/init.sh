#!/bin/busybox sh
# First process of the guest: modules, the scratch disk, the network, then the driver.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
# Some modules depend on others; a few passes settle the order on every architecture.
for pass in 1 2 3 4; do
  for module in /modules/*.ko; do insmod "$module" 2>/dev/null; done
done
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  [ -b /dev/vda ] && [ -e /sys/class/net/eth0 ] && break
  sleep 0.1
done
mount -t ext4 -o noatime /dev/vda /data
echo 500 > /proc/sys/vm/dirty_expire_centisecs
echo 100 > /proc/sys/vm/dirty_writeback_centisecs
ifconfig lo 127.0.0.1 up
ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
route add default gw 10.0.2.2
echo 'nameserver 10.0.2.3' > /etc/resolv.conf
export PATH=/bin
exec /guest
