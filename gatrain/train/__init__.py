"""The training core: windows, exact accumulation, the step, saved state. It knows no Typer, Hydra or Rich."""
