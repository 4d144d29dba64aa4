"""What test_multiprocess.py runs: `train.cli` on four fake devices, with a SIGTERM to itself if asked.

python tests/train_processes.py SIGTERM_AFTER ARGUMENTS..., 0 for never.
"""

import os
import signal
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"

from train.cli import main
from train.run.logs import RunLog

if __name__ == "__main__":
    last = int(sys.argv[1])
    add_step = RunLog.add_step

    def add_step_and_terminate(log: RunLog, row: dict, cases: list[str]) -> None:
        add_step(log, row, cases)
        if row["step"] == last - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    RunLog.add_step = add_step_and_terminate
    raise SystemExit(main(sys.argv[2:]))
