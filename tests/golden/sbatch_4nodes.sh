#!/bin/bash

# Parameters
#SBATCH --account=vision
#SBATCH --cpus-per-task=96
#SBATCH --gpus-per-node=8
#SBATCH --job-name=vit
#SBATCH --mem=0
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=PLACE/runs/vit/submitit/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=720
#SBATCH --wckey=submitit

# setup
cd PLACE/runs/vit/code || exit 1
if [ -f slurm/env.sh ]; then source slurm/env.sh; fi
module load cuda/13.0
cd PLACE/runs/vit/code || exit 1
export PYTHONPATH=PLACE/runs/vit/code${PYTHONPATH:+:$PYTHONPATH}
eval "set -- $(trap -p EXIT)"; at_exit=${3-}
epilogue() { code=$?; set +e; trap '' TERM USR2; [ $code = 0 ] || PYTHON -u -m launch.epilogue PLACE/runs/vit/submitit $code; (exit $code); eval "$at_exit"; }
trap epilogue EXIT

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output PLACE/runs/vit/submitit/%j_%t_log.out --kill-on-bad-exit=1 --wait=60 --cpus-per-task=96 PYTHON -u -m submitit.core._submit PLACE/runs/vit/submitit
