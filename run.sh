#!/bin/bash
[ -n "$BASH_VERSION" ] || exec bash "$0" "$@" # after `sh run.sh`, which may be another shell
# A script to train LeNet on MNIST with SGD, in the background: ./run.sh &
# Watch it with `tail -f logs/log.out`, stop it with `kill %1`. For one run, these settings can be
# given in front of it, and flags of main.py behind it: GPUID=1 ./run.sh --epochs 20 &

GPUID=${GPUID-0} # Select a GPU. If you want say two GPUs, set GPUID="0,1"; "" is the CPU.
LOGDIR=${LOGDIR:-./logs}
DATADIR=${DATADIR:-./data}

cd "$(dirname "$(readlink -f "$0")")" || exit # Relative folders are those beside this script.
mkdir -p -- "$LOGDIR" "$DATADIR" || exit
flags=(--data-dir "$DATADIR" --batch-size 128 --dropout 0.3 --momentum 0.9 --epochs 10)
if [[ " $*" == *" --resume"* ]]; then
  for run in "$LOGDIR"/run-* "${@#--resume=}"; do # A run that is there has flags of its own.
    [ -e "$run/checkpoint.pt" ] && flags=()
  done
fi

command=(python3)
[ -x .venv/bin/python ] && command=(.venv/bin/python)
IFS=, read -ra gpus <<<"$GPUID"
if [ ${#gpus[@]} -gt 1 ]; then # torchrun, with a process for each GPU
  command+=(-m torch.distributed.run --standalone --nproc-per-node=${#gpus[@]})
fi

export CUDA_VISIBLE_DEVICES=$GPUID
trap '' HUP # When you log off, this signal comes. torchrun, too, is to leave it alone:
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT
exec </dev/null >>"$LOGDIR/log.out" 2>&1
exec "${command[@]}" main.py --log-dir "$LOGDIR" "${flags[@]}" "$@" # It gets what kill sends.
