from st3core import PolynomialSchedule


def schedule_of(config: dict) -> PolynomialSchedule:
    """Schedule of a golden training, in steps."""
    steps = config["steps_per_epoch"]
    return PolynomialSchedule(
        config["final_sparsity"],
        begin_step=config["start_epoch"] * steps,
        end_step=config["end_epoch"] * steps,
        power=config["power"],
        update_frequency=config["update_frequency"],
    )
