#!/usr/bin/env bash
# What launch/tpu.py does on each worker of a TPU slice, over ssh; it is of no use by itself.
#
#   install COMMIT          the locked packages into .venv
#   start KEY ARGUMENTS     fdm in the background, so that it outlives the connection; KEY stands for the command
#   status                  one line: worker HOST (idle | running | exit=CODE) KEY COMMIT
#   stop SECONDS            SIGTERM, which saves, then wait so long for the end
#   kill                    SIGKILL
#
# State is kept in ~/fdm_run: log, pid (of fdm), supervisor (the process that waits for it), exit (code of the last run),
# key and commit.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
script=$repository/launch/tpu_worker.sh
state=$HOME/fdm_run
mkdir -p "$state"

note() { grep . "$state/$1" 2> /dev/null || echo -; } # empty where a full disk left it so

alive() { # FILE WORD: the process whose number is in the file; the word tells it from others
  local pid
  pid=$(note "$1")
  # A number may have been given away again after a reboot.
  kill -0 "$pid" 2> /dev/null && tr '\0' ' ' < "/proc/$pid/cmdline" | grep -q "$2"
}

running() {
  [ -e "$state/pid" ] && [ ! -e "$state/exit" ] || return 1
  alive pid fdm || alive supervisor supervise # which is about to write the exit code
}

await_end() { # SECONDS
  local i
  for ((i = 0; i < $1 * 10; i++)); do
    running || return 0
    sleep 0.1
  done
  return 1
}

status() {
  local what=idle
  if running; then what=running
  elif [ -e "$state/exit" ]; then what=exit=$(note exit)
  elif [ -e "$state/pid" ]; then what=exit=255 # vanished, as after a reboot
  fi
  echo "worker $(hostname) $what $(note key) $(note commit)"
}

# A Python that fdm_jax can live with.  TPU images bring 3.10: uv, from the package index, then fetches one.
find_python() {
  local name
  for name in python3.12 python3.13 python3.14 python3.11 python3; do
    if "$name" -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2> /dev/null; then
      command -v "$name"
      return
    fi
  done
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user "uv>=0.9,<1" >&2 # newer images ask for the variable
  python3 -m uv python install --quiet 3.12 >&2
  python3 -m uv python find --managed-python 3.12
}

case $1 in
  install)
    rm -f "$state/commit"
    command -v make > /dev/null || { sudo apt-get -qq update && sudo DEBIAN_FRONTEND=noninteractive apt-get -qq install -y make; } >&2
    make -C "$repository" install EXTRA=tpu PYTHON="$(find_python)"
    echo "$2" > "$state/commit"
    ;;
  start)
    key=$2
    shift 2
    if running; then
      echo "A run is under way on $(hostname) already." >&2
      exit 1
    fi
    rm -f "$state/pid" "$state/supervisor" "$state/exit"
    echo "$key" > "$state/key"
    setsid nohup bash "$script" supervise "$@" >> "$state/log" 2>&1 < /dev/null &
    for _ in {1..100}; do
      [ -e "$state/pid" ] && break
      sleep 0.1
    done
    status
    ;;
  supervise)
    shift
    cd "$repository"
    echo $$ > "$state/supervisor"
    # Where the TPU does not start (a process that ends may still have it), JAX would else go on with the CPU.
    JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} .venv/bin/fdm "$@" &
    echo $! > "$state/pid"
    code=0
    wait $! || code=$?
    echo "$code" > "$state/exit.new"
    mv "$state/exit.new" "$state/exit"
    ;;
  status)
    status
    ;;
  stop)
    if running; then
      kill -TERM "$(note pid)" || true
      await_end "$2" || echo "$(hostname): still running after $2 s." >&2
    fi
    status
    ;;
  kill)
    if running; then
      kill -KILL "$(note pid)" || true
      await_end 10
    fi
    status
    ;;
  *)
    echo "There is no verb $1." >&2
    exit 2
    ;;
esac
