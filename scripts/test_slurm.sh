#!/usr/bin/env bash
# Run ckpt-ema under a real Slurm on this machine and prove what the documentation promises.
#
#     scripts/test_slurm.sh
#
# Opt-in: it installs Slurm and MUNGE if they are missing (Debian or Ubuntu, as root or with sudo).
# Configuration, key, spool and logs live in a temporary folder, and the daemons end with the script.
# One line per proof; the exit code is 0 only if all pass. PYTHON names an interpreter that has
# ckpt-ema; default: .venv/bin/python, which is made first if need be.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-$(python3 scripts/environment.py)}
folder=$(realpath "$(mktemp -d "${TMPDIR:-/tmp}/ckpt-ema-slurm-XXXXXX")")
export SLURM_CONF=$folder/slurm.conf PATH=$PATH:/usr/sbin:/sbin
passed=0 failed=0

# --- Slurm ----------------------------------------------------------------------------------------

install_slurm() {
    command -v srun slurmctld slurmd munged >/dev/null && return
    local sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo)
    echo "installing slurm-wlm and munge" >&2
    { "${sudo[@]}" apt-get update -qq &&
        DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq slurm-wlm munge; } \
        >"$folder/apt.log" 2>&1 || { tail "$folder/apt.log" >&2; exit 1; }
}

free_port() {
    "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

write_configuration() {
    local host user
    host=$(hostname -s) user=$(id -un)
    mkdir "$folder"/{state,spool,munge}
    chmod 755 "$folder"  # MUNGE refuses a socket that others cannot reach
    chmod 711 "$folder/munge"
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
SlurmUser=$user
SlurmdUser=$user
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
MpiDefault=none
SchedulerType=sched/builtin
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
CONF
    echo "CgroupAutomount=no" >"$folder/cgroup.conf"
}

start_slurm() {
    munged --key-file="$folder/munge.key" --socket="$folder/munge/socket" --seed-file="$folder/seed" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log"
    slurmctld
    slurmd
    eventually 30 is_idle || { echo "Slurm does not start:" >&2; tail "$folder"/*.log >&2; exit 1; }
}

is_idle() { [ "$(sinfo -h -o %t 2>/dev/null)" = idle ]; }

stop_slurm() {
    local name pid
    scancel --user="$(id -un)" 2>/dev/null || true
    eventually 10 no_jobs || true
    for name in slurmd slurmctld munged; do
        pid=$(cat "$folder/$name.pid" 2>/dev/null) || continue
        kill "$pid" 2>/dev/null || continue
        eventually 10 is_gone "$pid" || kill -9 "$pid" || true
    done
    rm -rf "$folder"
}
trap stop_slurm EXIT
trap 'exit 130' INT TERM

# --- Helpers --------------------------------------------------------------------------------------

# Wait up to $1 seconds until the command in the other arguments succeeds.
eventually() {
    local until=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$until" ] || return 1
        sleep 0.1
    done
}

no_jobs() { [ -z "$(squeue -h 2>/dev/null)" ]; }
is_gone() { ! kill -0 "$1" 2>/dev/null; }
is_empty() { [ -z "$(ls -A "$1")" ]; }
# The process of rank $2 of job $1.
process() { scontrol listpids "$1.0" 2>/dev/null | awk -v rank="$2" '$5 == rank { print $1 }'; }
# Whether rank $2 of the job named like folder $1 has files of its unpublished output open.
is_folding() {
    local job
    job=$(job_of "$1")
    find "/proc/$(process "$job" "$2")/fd" -lname "$1/.out*" 2>/dev/null | grep -q .
}
job_of() { squeue -h -o %i --name="$(basename "$1")"; }
average() { "$python" -m ckpt_ema average "$@" -q --device cpu; }
same_model() { cmp -s "$1/model.safetensors" "$alone/model.safetensors"; }

# Report a proof: its name, then a command that succeeds if it holds.
prove() {
    local name=$1 start=$SECONDS
    shift
    if "$@" 2>"$folder/problem"; then
        passed=$((passed + 1))
        echo "ok      $name ($((SECONDS - start)) s)"
    else
        failed=$((failed + 1))
        echo "FAILED  $name ($((SECONDS - start)) s)"
        sed 's/^/        /' "$folder/problem"
    fi
}

# Fail with a message for the report.
wrong() {
    echo "$*" >&2
    return 1
}

# Three checkpoints of 64 MiB in $1. With $2, "nan" spoils the newest, "cut" shortens the second.
make_run() {
    "$python" - "$1" "${2:-}" <<'MAKE'
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

run, fault = Path(sys.argv[1]), sys.argv[2]
for step in (100, 200, 300):
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    torch.manual_seed(step)
    tensors = {f"layer.{number}.weight": torch.randn(1 << 20) for number in range(16)}
    if fault == "nan" and step == 300:
        tensors["layer.15.weight"][-1] = float("nan")
    file = folder / "model.safetensors"
    save_file(tensors, file)
    if fault == "cut" and step == 200:
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size - 4096)
MAKE
}

# Start a slow run of two ranks in the background, into the new folder $1 and with the options that
# follow; wait until both fold. Sets `launched`, the process of srun, and `job`.
start_slowly() {
    local place=$1
    shift
    mkdir "$place"
    srun -n 2 --job-name="$(basename "$place")" "$python" -m ckpt_ema average "$folder/run" \
        -o "$place/out" -q --device cpu --threads 1 --tile-size 1KiB "$@" >/dev/null 2>"$place.err" &
    launched=$!
    set -- "$place"
    eventually 60 is_folding "$1" 0 && eventually 10 is_folding "$1" 1 ||
        wrong "the fold did not begin: $(cat "$1.err")" || return
    job=$(job_of "$1")
}

# --- Proofs ---------------------------------------------------------------------------------------

two_ranks_give_the_bytes_of_one_process() {
    srun -n 2 "$python" -m ckpt_ema average "$folder/run" -o "$folder/two" -q --device cpu \
        >"$folder/two.out" || wrong "exit code $?" || return
    [ "$(cat "$folder/two.out")" = "$folder/two" ] || wrong "stdout: $(cat "$folder/two.out")" || return
    same_model "$folder/two" || wrong "other bytes"
}

# $1: run, $2: what the error names.
a_refusal_is_said_once() {
    local place=$1-outputs code=0
    mkdir "$place"
    srun -n 2 "$python" -m ckpt_ema average "$1" -o "$place/out" --device cpu \
        -q >/dev/null 2>"$place.err" || code=$?
    [ "$code" = 3 ] || wrong "exit code $code: $(cat "$place.err")" || return
    is_empty "$place" || wrong "left: $(ls -A "$place")" || return
    [ "$(grep -c '^error: ' "$place.err")" = 1 ] || wrong "not one error: $(cat "$place.err")" || return
    grep -q "^error: .*$2" "$place.err" || wrong "it does not name $2: $(cat "$place.err")"
}

# $1: the rank to kill.
a_killed_rank_ends_the_job() {
    local place=$folder/killed-$1 code=0 start
    start_slowly "$place" || return
    start=$SECONDS
    kill -9 "$(process "$job" "$1")"
    wait "$launched" || code=$?
    [ $((SECONDS - start)) -le 30 ] || wrong "it took $((SECONDS - start)) s" || return
    [ "$code" != 0 ] || wrong "exit code 0" || return
    is_empty "$place" || wrong "left: $(ls -A "$place")" || return
    grep -q '^error: ' "$place.err" || wrong "no error: $(cat "$place.err")"
}

scancel_leaves_nothing() {
    local place=$folder/cancelled code=0
    start_slowly "$place" || return
    scancel "$job"
    wait "$launched" || code=$?
    [ "$code" != 0 ] || wrong "exit code 0" || return
    eventually 30 is_empty "$place" || wrong "left: $(ls -A "$place")"
}

resume_after_scancel_gives_the_bytes_of_one_process() {
    local place=$folder/resumed
    start_slowly "$place" --resume || return
    scancel "$job"
    wait "$launched" || true
    eventually 30 no_jobs || wrong "the job did not end" || return
    ! is_empty "$place" || wrong "nothing was kept" || return
    srun -n 2 "$python" -m ckpt_ema average "$folder/run" -o "$place/out" -q --device cpu \
        --threads 1 --tile-size 1KiB --resume >/dev/null || wrong "exit code $?" || return
    same_model "$place/out" || wrong "other bytes" || return
    [ "$(ls -A "$place")" = out ] || wrong "left: $(ls -A "$place")"
}

an_array_and_finish_give_the_bytes_of_one_process() {
    local place=$folder/array
    mkdir "$place"
    sbatch --quiet --wait --array=1-3 --output="$place/%a.log" --export=ALL \
        --wrap="'$python' -m ckpt_ema average '$folder/run' -o '$place/out' -q --device cpu --part \$SLURM_ARRAY_TASK_ID/3" \
        || wrong "exit code $?: $(cat "$place"/*.log)" || return
    "$python" -m ckpt_ema finish "$place/out" -q >/dev/null || wrong "finish: exit code $?" || return
    same_model "$place/out" || wrong "other bytes"
}

# --- All of it ------------------------------------------------------------------------------------

install_slurm
write_configuration
start_slurm
make_run "$folder/run"
make_run "$folder/cut" cut
make_run "$folder/nan" nan
alone=$(average "$folder/run" -o "$folder/alone")

prove "srun -n 2 gives the bytes of one process" two_ranks_give_the_bytes_of_one_process
prove "a cut file is refused, once, and nothing is left" \
    a_refusal_is_said_once "$folder/cut" checkpoint-200
prove "NaN found by one rank ends both, is said once, and nothing is left" \
    a_refusal_is_said_once "$folder/nan" layer.15.weight
prove "kill -9 of the second rank ends the job, and nothing is left" a_killed_rank_ends_the_job 1
prove "kill -9 of the first rank ends the job, and nothing is left" a_killed_rank_ends_the_job 0
prove "scancel amid the work leaves nothing" scancel_leaves_nothing
prove "--resume after scancel gives the bytes of one process" \
    resume_after_scancel_gives_the_bytes_of_one_process
prove "an array of parts and finish give the bytes of one process" \
    an_array_and_finish_give_the_bytes_of_one_process

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
