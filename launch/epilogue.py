"""The batch script's last act, on a job whose step has failed: python -m launch.epilogue RUN/submitit EXIT_CODE

The first node's job (launch/job.py) decides what follows a start, and has SLURM start the run again. Where that job was
itself killed (by the kernel for want of memory, with slurmstepd, by hand), or hung before it met the others, nobody
would: SLURM takes the failed step for the end. The batch script outlives its step, so it asks here.
"""

import sys

from launch import job


def main(argv: list[str]) -> int:
    folder, code = argv
    try:
        mine = job.submitted(folder)
    except OSError as error:
        print(f"what follows is not known: {error.filename}: {error.strerror}", flush=True)
        return 1
    mine.conclude(int(code))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
