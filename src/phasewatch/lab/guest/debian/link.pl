#!/usr/bin/perl
# HTTP through bytes that look like TLS records, as the servers of the lab's network expect them on ports 443 and 8443.
# Nothing is encrypted. Arguments: HOST PORT METHOD PATH [FILE to upload]; the body of the answer goes to stdout.
use strict;
use warnings;
use IO::Socket::INET;

my ($host, $port, $method, $path, $file) = @ARGV;
$SIG{ALRM} = sub { die "no answer in time\n" };
alarm 60;
my $link = IO::Socket::INET->new(PeerAddr => $host, PeerPort => $port, Timeout => 5) or die "no connection\n";
binmode $link;
binmode STDOUT;
my $hello = join '', map { chr int rand 256 } 1 .. 200 + int rand 300;
print {$link} pack('C3n', 22, 3, 1, length $hello) . $hello;
$link->flush;
my $left = 3205;    # the length of the server's hello
my $part;
while ($left > 0) {
    my $n = read($link, $part, $left) or die "no hello\n";
    $left -= $n;
}

sub put {
    my ($data) = @_;
    while (length $data) {
        my $piece = substr $data, 0, 8192, '';
        print {$link} pack('C3n', 23, 3, 3, length $piece) . ($piece ^ ("\x5a" x length $piece)) or die "cannot send\n";
    }
}

my $size = $file ? -s $file : 0;
put("$method $path HTTP/1.0\r\nHost: web\r\n" . ($file ? "Content-Length: $size\r\n" : '') . "\r\n");
if ($file) {
    open my $in, '<:raw', $file or die "cannot read $file\n";
    while (read($in, $part, 65536)) { put($part) }
}
$link->flush;
my $got = 0;
while (sysread($link, $part, 65536)) { $got += length $part; print $part }
die "no answer\n" unless $got;
