"""The collapse watch: how far a dataset may lean on its own rows before somebody is told, or the run stops."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Watch(BaseModel):
    """What is looked at after every round, and between versions; an alarm comes where a figure crosses its threshold, null is none.

    Four alarms stop the run, since to go on makes them worse or buys rows of little worth: `real_at_least`, `depth_at_most`,
    `diversity_drop_at_most` and `tail_at_least`. Two only warn, since later rounds can mend them by asking others: `teacher_at_most`
    and `repeats_at_most`. What the figures are is said in `factory/watch.py`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    real_at_least: float | None = Field(None, gt=0, lt=1, description="share of real rows among real and accepted ones; stops")
    depth_at_most: int | None = Field(
        2, ge=1, description="generations between an accepted row and real ones: 1 was made from real rows alone; stops"
    )
    teacher_at_most: float | None = Field(None, gt=0, le=1, description="share of the accepted rows that one teacher made; warns")
    diversity_drop_at_most: float | None = Field(
        0.3,
        gt=0,
        lt=1,
        description="by how much the newest rows may be less varied than those of the first rounds, or a version than the last one, in "
        "NovelSum (of all, or within each place), distinct words or distinct pairs; 0.3 is 30%; stops",
    )
    tail_at_least: float | None = Field(
        0.02, gt=0, lt=1, description="share of the accepted rows that lie where the outermost fifth of real rows lie; stops"
    )
    repeats_at_most: float | None = Field(
        0.5, gt=0, lt=1, description="share of what a teacher made in a round that repeats what was there; names the teacher, warns"
    )
