#!/bin/bash
# A script to train LeNet on MNIST with SGD, in the background: ./run.sh &
# Watch it with `tail -f logs/log.out`, stop it with `kill %1`. For one run, put settings before
# the command, and main.py's flags after it: GPUID=1 LOGDIR=logs/b ./run.sh --epochs 20 &
[ -n "$BASH_VERSION" ] || exec bash "$0" "$@" # `sh run.sh` may start a shell that is not bash.
cd "$(dirname "$(readlink -f "$0")")" || exit # It runs in its own folder, wherever you are,
[ -e main.py ] || cd "${SLURM_SUBMIT_DIR:-$OLDPWD}" || exit # unless a batch system has copied it.
[ -e main.py ] || { echo "run.sh: error: there is no main.py beside it, or in $PWD" >&2; exit 1; }
PATH="$PWD/.venv/bin:$PATH" # If there is a .venv, you need not activate it.

if [[ " $*" == *" --log"* ]]; then # LOGDIR also holds the log, and the runs to resume.
  echo "run.sh: error: instead of --log-dir, put LOGDIR=FOLDER before the command" >&2; exit 2
fi
LOGDIR=${LOGDIR:-./logs} # as set before the command, or else ./logs
DATADIR=${DATADIR:-} # "" is ./data, or the folder that a run to resume has used
mkdir -p "$LOGDIR" || exit
# Select a GPU. If you want say two GPUs, set GPUID="0,1"; "" is the CPU.
GPUID=${GPUID-${CUDA_VISIBLE_DEVICES-0}}
IFS=, read -ra gpus <<<"$GPUID"
if [ ${#gpus[@]} -gt 1 ]; then # torchrun starts a process for each GPU of this machine.
  torchrun=(-m torch.distributed.run "--nproc-per-node=${#gpus[@]}")
  torchrun+=(--standalone --local-addr=127.0.0.1) # The machine's own name may not resolve.
fi

flags=(--batch-size 128 --dropout 0.3 --momentum 0.9 --epochs 10)
for run in "$LOGDIR"/run-* "${@#--resume=}"; do # A run that is resumed keeps its flags.
  [[ " $*" == *" --resume"* && -e $run/checkpoint.pt ]] && flags=()
done

trap '' HUP # Logging off sends this signal. Python then ignores it, too; torchrun does if told to:
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT
# exec replaces this script with Python, so that `kill %1` reaches it. It reads no input
# (</dev/null), and appends its output and its errors (2>&1) to the log (>>).
CUDA_VISIBLE_DEVICES=$GPUID exec python3 -u "${torchrun[@]}" main.py \
  --log-dir "$LOGDIR" "${flags[@]}" ${DATADIR:+--data "$DATADIR"} "$@" \
  </dev/null >>"$LOGDIR/log.out" 2>&1
