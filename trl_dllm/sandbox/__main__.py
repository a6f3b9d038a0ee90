"""What `run` starts: `python -I -S` on this folder, which makes the package `inside` importable and nothing else."""

from inside.launcher import main


main()
