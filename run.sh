#!/bin/bash
# Trains LeNet on MNIST with SGD, in the background if started so:  ./run.sh &
# To watch it: tail -f logs/log.out. To stop it: kill %1, or kill with its process id.
# Flags of main.py can be added, and the settings be given anew for one run:
#   GPUID=0,1 LOGDIR=./logs-2 ./run.sh --epochs 20 --resume &

GPUID=${GPUID-0} # the GPU; "0,1" trains on two of them, "" on the CPU
LOGDIR=${LOGDIR:-./logs}
DATADIR=${DATADIR:-./data}

set -e # no training where one of the next lines fails; each says why
cd "$(dirname "$(readlink -f "$0")")" # relative folders are those beside this script
mkdir -p -- "$LOGDIR"
mkdir -p -- "$DATADIR"

# Two runs would write to one log. This file is locked until the training, which keeps it
# open, has ended. (macOS has no flock: there, main.py alone refuses the second run.)
exec 9>>"$LOGDIR/.lock-run.sh"
if command -v flock >/dev/null && ! flock --nonblock 9; then
  echo "run.sh: another run is using LOGDIR=$LOGDIR: wait for its end, or choose another" >&2
  exit 1
fi

log=$LOGDIR/log.out
if [ -e "$log" ]; then # of an earlier run: kept
  n=1
  while [ -e "$LOGDIR/log-$n.out" ]; do n=$((n + 1)); done
  mv -- "$log" "$LOGDIR/log-$n.out"
fi
exec </dev/null >"$log" 2>&1 # the errors as well

# A dropped connection sends SIGHUP. What is ignored here stays so in the training, but
# torchrun would handle it again: this leaves it the others.
trap '' HUP
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT

export CUDA_VISIBLE_DEVICES=$GPUID
command=("${PYTHON:-python}" -u) # -u: lines reach the log as they are printed
IFS=, read -ra gpus <<<"$GPUID"
if [ ${#gpus[@]} -gt 1 ]; then # torchrun, from the same Python: a process per GPU
  command+=(-m torch.distributed.run --standalone --nproc-per-node=${#gpus[@]})
fi
# exec: the process id of this script becomes the training's, so that kill reaches it.
exec "${command[@]}" main.py --data-dir "$DATADIR" --log-dir "$LOGDIR" \
  --batch-size 128 --dropout 0.3 --momentum 0.9 --epochs 10 "$@"
