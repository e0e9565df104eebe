# Sourced by every job on its first node, before srun; what is exported reaches all nodes.
# A run takes the copy in its own folder (RUN/code/slurm/env.sh), so later edits do not touch it.
# What belongs to one cluster alone stands in its profile: env, setup, environment (docs/your-cluster.md).

# Modules of the site:
# module purge
# module load cuda/13.0 nccl

# What NCCL decides, in the logs of the ranks:
# export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET
