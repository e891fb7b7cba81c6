"""`python -m benchmarks` runs the suite with its defaults; each script has options of its own."""

from benchmarks import decode

decode.main()
