"""Stages that give verdicts; none of them removes anything."""
