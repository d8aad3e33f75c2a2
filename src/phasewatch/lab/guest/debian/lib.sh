# Shared by all kinds, which source it first and are called with SEED NAME=VALUE...; not a program.
#
# It starts the kind again in a PID namespace of its own, so that servers that leave the process group end with it, too.
# Then it sets: knob[NAME] and at[ROLE] from the arguments, work (the kind's folder on the scratch disk), docs (the
# documents) and duty (share of the time at work, in permille).
if [ -z "${phasewatch_inside:-}" ]; then
  export phasewatch_inside=1
  exec unshare --pid --fork --kill-child=KILL --mount-proc -- env --default-signal=PIPE /bin/bash "$0" "$@"
fi

name=${0##*/}
exec 9>&2 2>"/run/phasewatch/$name.log" # a serial console is slow; only the reason of a failure goes there
exec {never}<> <(:)
seed=$1
shift
RANDOM=$((seed % 32768 < 0 ? -(seed % 32768) : seed % 32768))
declare -A knob at
for word in "$@"; do
  case $word in
    at.*)
      word=${word#at.}
      at[${word%%=*}]=${word#*=}
      ;;
    *) knob[${word%%=*}]=${word#*=} ;;
  esac
done
work=/data/work/$name
docs=()

fail() { # REASON: end the kind; the host sees an exit status that is not 0
  echo "$name: $1: $(tail -n 1 "/run/phasewatch/$name.log")" >&9
  exit 1
}

whole() { # NAME DEFAULT: set a variable to a knob, at least 1
  printf -v "$1" '%.0f' "${knob[$1]:-$2}"
  ((${!1} > 0)) || printf -v "$1" 1
}
permille() { # NAME DEFAULT: the same, times 1000
  printf -v "$1" '%.0f' "${knob[$1]:-$2}e3"
  ((${!1} > 0)) || printf -v "$1" 1
}
between() { drawn=$(($1 + (RANDOM << 15 | RANDOM) % ($2 - $1 + 1))); }
permille duty 0.5

pause_ms() { # a builtin, because a process for each pause would be work
  local ms=$1
  ((ms > 0)) || return 0
  ((ms < 30000)) || ms=30000
  read -rt "$((ms / 1000)).$(printf %03d $((ms % 1000)))" -u "$never" || :
}

address() { # ROLE: set host and port to the address that the episode's world gives the role
  local where=${at[$1]:-10.0.2.80:80}
  host=${where%:*} port=${where##*:}
}

look_up() { # ROLE: set host and port, and resolve the server's name now and then, as programs do
  address "$1"
  [ -z "${knob[name.$1]:-}" ] || ((RANDOM % 3)) || getent ahostsv4 "${knob[name.$1]}" >/dev/null
}

fetch() { # ROLE PATH FILE [KB_PER_S]: download; false if the server does not give it
  look_up "$1"
  case $port in
    443 | 8443) timeout 60 perl /usr/lib/phasewatch/link.pl "$host" "$port" GET "$2" >"$3" ;;
    *) curl -fsS --connect-timeout 5 -m 60 ${4:+--limit-rate "$4k"} -o "$3" "http://$host:$port$2" ;;
  esac
}

upload() { # ROLE PATH FILE [KB_PER_S]: send a file; false if the server does not take it
  look_up "$1"
  case $port in
    443 | 8443) timeout 60 perl /usr/lib/phasewatch/link.pl "$host" "$port" POST "$2" "$3" >/dev/null ;;
    *) curl -fsS --connect-timeout 5 -m 60 ${4:+--limit-rate "$4k"} -o /dev/null -H 'Expect:' --data-binary "@$3" "http://$host:$port$2" ;;
  esac
}

seconds=${knob[seconds]:-${knob[infect_s]:-15}}
printf -v seconds_ms '%.0f' "${seconds}e3"
begun_us=${EPOCHREALTIME/./}
until_share() { pause_ms $((seconds_ms * $1 / 1000 - (${EPOCHREALTIME/./} - begun_us) / 1000)); } # PERMILLE of the phase

fresh_work() { rm -rf "$work" && mkdir -p "$work" "$HOME" && cd "$work" || fail "no folder"; }

list_docs() {
  mapfile -t docs < <(find /data/docs -type f | sort)
  ((${#docs[@]} > 0)) || fail "no documents"
}

pick() { # COUNT: set picked to that many documents
  local i
  picked=()
  ((${#docs[@]} > 0)) || list_docs
  for ((i = 0; i < $1; i++)); do picked+=("${docs[(RANDOM << 15 | RANDOM) % ${#docs[@]}]}"); done
  for i in "${picked[@]}"; do # a step of an attack may have renamed it
    [ -e "$i" ] || { list_docs && pick "$1" && return; }
  done
}

cool() { vmtouch -qe "$@" >/dev/null || :; } # drop files from the page cache: a machine with more files than memory reads

wait_for() { # COMMAND...: repeat it until it succeeds
  local try
  for ((try = 0; try < 150; try++)); do "$@" >/dev/null 2>&1 && return; pause_ms 200; done
  fail "did not start: $1"
}

walk() { # STEP...: play the steps in random order until the host kills the kind
  local steps=("$@") failures=0 step started spent rest
  while :; do
    step=${steps[RANDOM % ${#steps[@]}]}
    started=${EPOCHREALTIME/./}
    moved_kb=0
    if "$step"; then
      failures=0
    else
      echo "$step failed" >&2
      ((++failures < 3)) || fail "three steps failed in a row"
    fi
    spent=$(((${EPOCHREALTIME/./} - started) / 1000))
    rest=$((spent * (1000 - duty) / duty * (50 + RANDOM % 100) / 100))
    if [ -n "${rate_kbps:-}" ] && ((moved_kb * 1000 / rate_kbps - spent > rest)); then
      rest=$((moved_kb * 1000 / rate_kbps - spent))
    fi
    pause_ms "$rest"
    if ((RANDOM % 10 == 0)); then between 1000 12000 && pause_ms "$drawn"; fi # people and schedulers pause
  done
}

pace() { # KB STARTED_US: rest so that the rate stays below rate_kbps
  pause_ms $(($1 * 1000 / (rate_kbps > 0 ? rate_kbps : 1) - (${EPOCHREALTIME/./} - $2) / 1000))
}

size_kb() { moved_kb=$(($(stat -c %s -- "$@" | paste -sd+) >> 10)); }
