"""One command line as one job: SLURM settings, submission, attempts and requeueing."""
