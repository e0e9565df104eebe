# Sourced by every job on its first node, before srun; what is exported reaches all nodes.
# A run takes the copy in its own folder (RUN/code/slurm/env.sh), so later edits do not touch it.

# Modules of the site:
# module purge
# module load cuda/13.0 nccl

# Which network NCCL and gloo use, where they choose a wrong one (`ip -br addr` lists them):
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5_0,mlx5_1

# What NCCL decides, in the logs of the ranks:
# export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET

# Compute nodes without internet: weights and data from what the login node has downloaded.
# export HF_HOME=/shared/$USER/huggingface HF_HUB_OFFLINE=1
