"""Who guesses in tests, and an account of it that never says no."""

from __future__ import annotations

import random

from taut.engine.request import Request

from .tiny import VOCAB


class Always:
    """A ledger for which every guess pays."""

    def affords(self, rows, drafted):
        return True

    def record(self, rows, drafted, right, seconds):
        pass


class Prompter:
    """Guesses that are right as often as asked: it knows the answers."""

    def __init__(self, answers, rate: float, most: int = 6, seed: int = 0):
        self.answers, self.rate, self.most, self.draw = answers, rate, most, random.Random(seed)
        self.learned: list[tuple[int, int]] = []
        self.forgotten: list[Request] = []

    def propose(self, requests):
        guesses = {}
        for request in requests:
            at = len(request.output)
            rest = self.answers[tuple(request.prompt)][at : at + self.draw.randint(0, self.most)]
            guesses[request] = [
                t if self.draw.random() < self.rate else self.draw.randrange(VOCAB) for t in rest
            ]
        return guesses

    def learn(self, request, offered, right):
        self.learned.append((offered, right))

    def rests(self, request):
        return self.draw.random() < 0.5

    def forget(self, request):
        self.forgotten.append(request)
