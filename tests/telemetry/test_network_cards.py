"""Parse network cards from the answers of QEMU 7.2."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from phasewatch.telemetry.network_cards import count_passthrough_cards, count_unplugged_cards, parse_network_cards

# From a QEMU 7.2 with every way to plug a card in.
NETWORK = """hub 0
 \\ hub0port1: #net238: index=0,type=user,net=10.0.2.0,restrict=on
filters:
  - pw-net238-rx: type=filter-dump,file=/x/#net238-rx,maxlen=160,position=tail,status=on,insert=behind,netdev=#net238,\
queue=rx
 \\ hub0port0: e1000.1: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:58
hub 3
 \\ hp: e1000.2: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:59
spare: index=0,type=user,net=10.0.2.0,restrict=off
virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56
 \\ #net008: index=0,type=user,net=10.0.2.0,restrict=on
filters:
  - pw-net008-rx: type=filter-dump,file=/x/#net008-rx,maxlen=160,position=tail,status=on,insert=behind,netdev=#net008,\
queue=rx
nic0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:5c
 \\ t0: index=0,type=tap,ifname=tap3,script=no,downscript=no
fds: index=0,type=nic,model=e1000e,macaddr=52:54:00:12:34:5d
 \\ hostnet0: index=0,type=tap,fd=34
nicmq: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:5a
 \\ mq: index=0,type=tap,ifname=pwxm,script=no,downscript=no
nicmq: index=1,type=nic,
 \\ mq: index=1,type=tap,ifname=pwxm,script=no,downscript=no
usb-net.0: index=0,type=nic,model=usb-net,macaddr=52:54:00:12:34:5e
 \\ un: index=0,type=user,net=10.0.2.0,restrict=off
lonely: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:5b
"""


def test_every_card_with_a_backend_is_found() -> None:
    cards = {card.netdev: card for card in parse_network_cards(NETWORK.replace("\n", "\r\n"))}

    assert list(cards) == ["hub0port0", "hp", "#net008", "t0", "hostnet0", "mq", "un"]
    assert (cards["t0"].kind, cards["t0"].ifname, cards["t0"].mac.hex()) == ("tap", "tap3", "52540012345c")
    assert (cards["hostnet0"].ifname, cards["hostnet0"].fd) == ("", 34)
    assert (cards["mq"].queues, cards["t0"].queues) == (2, 1)
    assert (cards["hub0port0"].name, cards["hub0port0"].model) == ("e1000.1", "e1000")
    assert count_unplugged_cards(NETWORK) == 1


def test_text_without_cards_gives_no_card() -> None:
    assert parse_network_cards("") == parse_network_cards("hub 0\n") == ()
    assert count_unplugged_cards("") == 0


def test_a_passed_through_card_is_counted() -> None:
    cards = parse_network_cards(NETWORK)  # of which six are on PCI, and the lonely one
    buses = [{"devices": [{"class_info": {"class": 0x0200}}] * 7}]

    assert count_passthrough_cards(buses, cards, count_unplugged_cards(NETWORK)) == 0
    assert count_passthrough_cards([*buses, {"devices": [{"class_info": {"class": 0x0280}}]}], cards, 1) == 1


@given(st.text(alphabet="nic: index=0,type\\\\n hub\\x00macaddr5", max_size=200))
def test_any_text_is_parsed_without_an_error(text: str) -> None:
    parse_network_cards(text)
    count_unplugged_cards(text)
