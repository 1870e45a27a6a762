"""The templates of all kinds of expressions.

`n` stands for a noun, `p` for its plural, `an` for the noun with its article, `c` for a colour,
`m` for the noun of a landmark, `k` for a number in letters, `o` for an ordinal, `s` for a side,
`x` and `y` for conditions ("red", "on the left", "above the car").
"""

from sam4mllm_tool.scenes.speaker import Wordings

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
SHORT_NAMES = {"alarm clock": "clock", "pair of scissors": "scissors"}

CATEGORY = Wordings(
    ("the {n}", "the {n} in the picture", "the only {n}", "{n}", "the {n} here", "{an}",
     "the {n} that you see", "this {n}"),
    ("the {n} that is in the picture", "the only {n} here", "the one {n}", "this {n} here",
     "{an} in the picture"),
)  # fmt: skip
COLOUR = Wordings(
    ("the {c} {n}", "the {n} that is {c}", "the {c}-coloured {n}", "{c} {n}",
     "the {n} which is {c}", "the {n} of {c} colour", "the {n} coloured {c}", "a {c} {n}"),
    ("the {n} that is coloured {c}", "the {n} of the colour {c}", "the {n} in {c}",
     "the {c} coloured {n}", "the one {n} that is {c}", "this {c} {n}"),
)  # fmt: skip
BIGGEST = Wordings(
    ("the biggest {n}", "the largest {n}", "the {n} that is bigger than the others",
     "the {n} which is the biggest", "the largest of the {p}", "the biggest of all {p}"),
    ("the {n} that is the largest", "the biggest of the {p}", "the largest of all the {p}",
     "the {n} larger than the others"),
)  # fmt: skip
BIGGER = Wordings(
    ("the bigger {n}", "the larger of the two {p}", "the big {n}", "the larger {n}",
     "the biggest {n}", "the large {n}", "the {n} that is bigger than the other"),
    ("the bigger of the two {p}", "the {n} which is larger", "the bigger one of the two {p}",
     "the {n} larger than the other", "the {n} that is big"),
)  # fmt: skip
SMALLEST = Wordings(
    ("the smallest {n}", "the tiniest {n}", "the {n} that is smaller than the others",
     "the {n} which is the smallest", "the tiniest of the {p}", "the smallest of all {p}"),
    ("the {n} that is the tiniest", "the smallest of the {p}", "the tiniest of all the {p}",
     "the {n} smaller than the others"),
)  # fmt: skip
SMALLER = Wordings(
    ("the smaller {n}", "the smaller of the two {p}", "the small {n}", "the little {n}",
     "the smallest {n}", "the tiny {n}", "the {n} that is smaller than the other"),
    ("the little one of the two {p}", "the {n} which is smaller", "the {n} that is small",
     "the {n} smaller than the other", "the smaller one of the {p}"),
)  # fmt: skip
POSITION = {
    "left": Wordings(
        ("the leftmost {n}", "the {n} furthest to the left", "the {n} closest to the left edge",
         "the {n} on the far left"),
        ("the {n} that is furthest to the left", "the leftmost of the {p}",
         "the {n} nearest to the left edge"),
    ),
    "right": Wordings(
        ("the rightmost {n}", "the {n} furthest to the right",
         "the {n} closest to the right edge", "the {n} on the far right"),
        ("the {n} that is furthest to the right", "the rightmost of the {p}",
         "the {n} nearest to the right edge"),
    ),
    "top": Wordings(
        ("the topmost {n}", "the highest {n}", "the {n} nearest the top",
         "the {n} closest to the top edge", "the {n} at the very top"),
        ("the {n} that is the highest", "the topmost of the {p}", "the {n} closest to the top",
         "the {n} furthest to the top"),
    ),
    "bottom": Wordings(
        ("the bottommost {n}", "the lowest {n}", "the {n} nearest the bottom",
         "the {n} closest to the bottom edge", "the {n} at the very bottom"),
        ("the {n} that is the lowest", "the bottommost of the {p}",
         "the {n} closest to the bottom", "the {n} furthest to the bottom"),
    ),
}  # fmt: skip
POSITION_OF_TWO = {
    "left": Wordings(
        ("the {n} on the left", "the left {n}", "the left one of the two {p}",
         "the {n} on the left side", "the leftmost {n}", "the {n} at the left of the picture"),
        ("the {n} that is on the left", "the {n} which is on the left side",
         "the left one of the {p}",
         "the {n} on the left side of the picture"),
    ),
    "right": Wordings(
        ("the {n} on the right", "the right {n}", "the right one of the two {p}",
         "the {n} on the right side", "the rightmost {n}", "the {n} at the right of the picture"),
        ("the {n} that is on the right", "the {n} which is on the right side",
         "the right one of the {p}",
         "the {n} on the right side of the picture"),
    ),
    "top": Wordings(
        ("the upper {n}", "the top {n}", "the higher of the two {p}", "the {n} at the top",
         "the {n} higher up", "the topmost {n}"),
        ("the {n} that is at the top", "the upper one of the two {p}", "the higher {n}",
         "the {n} at the top of the picture"),
    ),
    "bottom": Wordings(
        ("the lower {n}", "the bottom {n}", "the lower of the two {p}", "the {n} at the bottom",
         "the {n} lower down", "the bottommost {n}"),
        ("the {n} that is at the bottom", "the lower one of the two {p}", "the {n} which is lower",
         "the {n} at the bottom of the picture"),
    ),
}  # fmt: skip
ORDINAL = Wordings(
    ("the {o} {n} from the {s}", "{n} number {k} from the {s}",
     "the {o} {n} counting from the {s}", "the {o} of the {p} from the {s}"),
    ("the {n} that is {o} from the {s}", "the {o} {n} when counting from the {s}",
     "the {o} of the {p} counting from the {s}"),
)  # fmt: skip
BESIDE = {
    "left": Wordings(("to the left of the {m}", "left of the {m}", "on the left of the {m}",
                      "on the left side of the {m}", "further to the left than the {m}"),
                     ("at the left of the {m}", "further left than the {m}",
                      "at the left side of the {m}")),
    "right": Wordings(("to the right of the {m}", "right of the {m}", "on the right of the {m}",
                       "on the right side of the {m}", "further to the right than the {m}"),
                      ("at the right of the {m}", "further right than the {m}",
                       "at the right side of the {m}")),
    "top": Wordings(("above the {m}", "higher up than the {m}", "over the {m}",
                     "higher than the {m}"),
                    ("up above the {m}", "further up than the {m}", "up over the {m}")),
    "bottom": Wordings(("below the {m}", "lower down than the {m}", "under the {m}",
                        "beneath the {m}", "lower than the {m}", "further down than the {m}"),
                       ("down below the {m}", "down under the {m}", "further below than the {m}")),
}  # fmt: skip
"""Where a thing lies as seen from a landmark, by side."""
RELATION = Wordings(
    ("the {n} {x}", "the {n} {x}", "the {n} that is {x}", "the {n} which is {x}"),
    ("the {n} that you see {x}", "the one {n} {x}", "the {n} here that is {x}"),
)
PLACE = {
    "left": Wordings(("on the left", "on the left side", "at the left"),
                     ("on the left side of the picture", "at the left side")),
    "right": Wordings(("on the right", "on the right side", "at the right"),
                      ("on the right side of the picture", "at the right side")),
    "top": Wordings(("at the top", "at the top of the picture"),
                    ("at the top edge", "up at the top")),
    "bottom": Wordings(("at the bottom", "at the bottom of the picture"),
                       ("at the bottom edge", "down at the bottom")),
}  # fmt: skip
"""Where a thing lies in the picture, or among its like, by side."""
AT_PLACE = Wordings(("the {n} {x}",), ("the {n} you see {x}", "the one {n} {x}"))
ATTRIBUTE = Wordings(("the {x} {n}",), ("this {x} {n}", "the one {x} {n}"))
PLURAL = Wordings(
    ("all the {p}", "the {p}", "every {n}", "the {k} {p}", "all {k} {p}", "each {n}", "{k} {p}",
     "all of the {p}", "the {p} in the picture"),
    ("all the {p} in the picture", "every one of the {p}", "all of the {k} {p}", "each of the {p}"),
)  # fmt: skip
PLURAL_OF_TWO = Wordings(
    ("both {p}", "the two {p}", "all the {p}", "the {p}", "every {n}", "two {p}",
     "both of the {p}", "each {n}"),
    ("both the {p}", "both of the two {p}", "each of the two {p}", "the two {p} in the picture"),
)  # fmt: skip
MISCOUNTED = Wordings(
    ("the {k} {p}", "all {k} {p}", "{k} {p}"),
    ("all the {k} {p}", "all of the {k} {p}", "the {k} {p} in the picture"),
)
MISCOUNTED_AS_TWO = Wordings(
    ("both {p}", "the two {p}", "both of the {p}"),
    ("both the {p}", "both of the two {p}", "the two {p} in the picture"),
)
NOT = Wordings(
    ("the {n} that is not {x}", "the {n} which is not {x}", "the {n} that isn't {x}",
     "the only {n} not {x}"),
    ("the {n} which isn't {x}", "the only {n} that is not {x}", "the one {n} that isn't {x}",
     "the {n} here that is not {x}"),
)  # fmt: skip
NOT_SEVERAL = Wordings(
    ("the {p} that are not {x}", "all {p} that are not {x}", "the {p} which aren't {x}",
     "every {n} that is not {x}"),
    ("all the {p} which are not {x}", "the {p} that aren't {x}", "each {n} that isn't {x}"),
)  # fmt: skip
OTHER = Wordings(
    ("the {x} that is not {an}", "the {x} that isn't {an}", "the {x} which is not {an}",
     "the {x} that is not the {n}"),
    ("the {x} which isn't {an}", "the only {x} that is not {an}", "the {x} other than {an}"),
)  # fmt: skip
SOMETHING = Wordings(
    (*OTHER.train, "something other than {an}"), (*OTHER.held_out, "something that is not {an}")
)
"""The same among things of all classes."""
OTHERS = Wordings(
    ("the {y} that are not {p}", "all {y} that are not {p}", "every {x} that is not {an}",
     "the {y} which aren't {p}", "all {y} other than {p}"),
    ("all the {y} which are not {p}", "each {x} that isn't {an}", "the {y} other than {p}",
     "the {y} that aren't {p}"),
)  # fmt: skip
CLASSES = {"object": "objects", "thing": "things", "animal": "animals", "shape": "shapes"}
NEXT_TO = Wordings(
    ("next to the {m}", "beside the {m}", "near the {m}", "close to the {m}", "by the {m}"),
    ("close by the {m}", "very near the {m}", "very close to the {m}"),
)
NEAREST = Wordings(
    ("the {n} nearest to the {m}", "the {n} closest to the {m}", "the {n} nearest the {m}",
     "the nearest {n} to the {m}", "the {n} that is closest to the {m}"),
    ("the {n} which is nearest to the {m}", "the {n} that is the nearest to the {m}",
     "the closest {n} to the {m}"),
)  # fmt: skip
ONE_CLAUSE = Wordings(
    ("the {n} that is {x}", "the {n} which is {x}"),
    ("the one {n} which is {x}", "the {n} here that is {x}"),
)
JOINED = Wordings(
    ("the {n} that is {x} and {y}", "the {n} which is {x} and is {y}", "the {n} {x} and {y}"),
    ("the {n} that is {x} and is {y}", "the {n} which is {x} and {y}",
     "the {n} that is {x} and which is {y}"),
)  # fmt: skip
PLACED = Wordings(
    (*JOINED.train, "the {n} {x} that is {y}", "the {n} {x} which is {y}"),
    (*JOINED.held_out, "the one {n} {x} that is {y}"),
)
"""The same where `x` names no other object that a clause could be about."""
REQUEST = Wordings(
    ("find {x}", "please find {x}", "show me {x}", "can you show me {x}?", "segment {x}",
     "please segment {x}", "where is {x}?", "which one is {x}?", "mark {x}", "do you see {x}?"),
    ("can you find {x}?", "please show me {x}", "can you please segment {x}?", "which is {x}?",
     "please mark {x}", "where do you see {x}?"),
)  # fmt: skip
ABSENT = Wordings(
    (*CATEGORY.train, "the {n} on the left", "the {n} on the right", "the biggest {n}",
     "the small {n}", "all the {p}", "both {p}", "the {p}"),
    (*CATEGORY.held_out, "the {n} which is on the left side", "the {n} that is the largest",
     "all the {p} in the picture", "both the {p}"),
)  # fmt: skip
