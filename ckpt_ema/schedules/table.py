"""Every schedule, by name, and every option of one.

A new schedule is a formula and an entry in one of the modules below, and a type for each new option
in `options.Keywords`.
"""

from ckpt_ema.schedules import by_checkpoint, by_step, dynamic
from ckpt_ema.schedules.schedule import Schedule

DEFAULT_SCHEDULE = "dynamic"
EXPLICIT = "weights"  # the schedule whose weights a file gives

# Other names that people know.
SYNONYMS = {"ema": "dynamic", "swa": "uniform", "lawa": "uniform", "karras": "power"}

ALL = {
    **dynamic.SCHEDULES,
    **by_checkpoint.SCHEDULES,
    **by_step.SCHEDULES,
    EXPLICIT: Schedule(None, "explicit weights", is_implied=True),
}
# Those that --schedule may name.
SCHEDULES = {name: schedule for name, schedule in ALL.items() if not schedule.is_implied}

# Every option of every schedule, by name.
OPTIONS = {option.name: option for schedule in ALL.values() for option in schedule.options}
