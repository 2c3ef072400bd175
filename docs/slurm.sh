#!/bin/bash
# A run on two nodes of a Slurm cluster. Its flags are train.py's:
#
#     sbatch docs/slurm.sh --data train.safetensors --model llama-2-13b-hf --out out/openchat-13b
#
# When the job is preempted, or five minutes before its time is over, the run saves and the job goes
# back into the queue, where it goes on from the checkpoint. All its parts write one log.

#SBATCH --job-name=openchat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
# %j is the same number after a requeue
#SBATCH --output=openchat-%j.log
#SBATCH --open-mode=append
# to this shell alone, so many seconds before the end
#SBATCH --signal=B:TERM@300

log=openchat-$SLURM_JOB_ID.log

# The agents of all nodes meet in a store on the first node. A node that is lost may then come back:
# docs/training.md, "Two nodes".
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# seconds that an agent gives its ranks to finish a step and save; below the 300 above
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270

srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --max_restarts=3 \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$host:29500" \
    train.py "$@" &
run=$!

# scancel with a signal sends it to every process of the run, and ends nothing by itself. A kill of
# srun would end them at once.
asked=
trap 'asked=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# The trap interrupts wait: then it is still the run that we wait for.
wait "$run"
status=$?
while [ "$asked" ]; do
    asked=
    wait "$run"
    status=$?
done

# torchrun's exit code does not tell a run that has saved from one that failed. Its log does. One
# that failed, by a wrong flag for example, would only fail again.
if [ "$status" -ne 0 ] && tail -n 200 "$log" | grep -q "stopped by a signal after step"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
