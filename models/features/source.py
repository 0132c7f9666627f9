"""The source text of a declaration's kernel.

`scan` walks one entity's sorted events once and writes every feature at every cutoff. It is plain
scalar Python over arrays, so that the same text compiles for CPU threads (`numba.njit`) and for
CUDA (`numba.cuda`, a thread an entity). Its cost is events + rows, whatever the windows hold:

- sums are differences of prefix sums, kept as unevaluated pairs of doubles (T. Ogita, S. M. Rump,
  S. Oishi, "Accurate sum and dot product", SIAM J. Sci. Comput. 26, 2005; products by T. J.
  Dekker's splitting, Numer. Math. 18, 1971), so that a difference is as good as summing anew;
- min and max are the first entry of a monotone stack inside the window: one stack serves all
  windows, and each window's place in it only moves forward between pushes;
- distinct values are counted by a bit an event, set while it is the last one of its value:
  the window's number of values is the number of bits set in it.

Knows nothing of tables, files or compilers.
"""

import math
from collections.abc import Callable
from functools import partial

from models.features.listing import Feature
from models.features.shape import Shape
from models.features.spec import FeatureSpec, LabelSpec
from models.features.templates import ARGUMENTS, CPU, CUDA, HEADER
from models.features.windows import fixed_us

LN2 = math.log(2.0)

# What changes from cutoff to cutoff without any event.
_BY_TIME = frozenset({"recency", "tenure", "overdue", "decay", "since_last"})


def source(spec: FeatureSpec, made: Shape, device: str) -> str:
    """The kernel's module.

    Args:
        spec: the declaration.
        made: its shape.
        device: "cpu" or "cuda".
    """
    imports = {
        "cpu": 'from numba import njit\n\ndevice = njit(nogil=True, error_model="numpy")\n',
        "cuda": "from numba import cuda\n\ndevice = cuda.jit(device=True)\n",
    }[device]
    head, rest = HEADER.split("NAN = ", 1)
    driver = {"cpu": CPU, "cuda": CUDA}[device].format(
        doubles=max(made.doubles, 1),
        ints=max(made.ints, 1),
        stacks=max(len(made.stacks), 1),
        distinct=max(len(made.distinct), 1),
        slots=max(made.total_slots, 1),
    )
    return head + imports + "\nNAN = " + rest + "\n" + _Writer(spec, made).scan() + driver


class _Writer:
    """Writes `scan` for one declaration."""

    def __init__(self, spec: FeatureSpec, made: Shape) -> None:
        self.spec, self.made = spec, made
        self.lines: list[str] = []
        self.level = 1
        self.known: set[str] = set()

    def put(self, text: str = "", deeper: int = 0) -> None:
        for line in text.strip("\n").splitlines():
            self.lines.append("    " * (self.level + deeper) + line if line else "")

    def scan(self) -> str:
        self.lines = [
            "@device",
            "def scan(",
            f"    s0, s1, c0, c1, row, z, zw, {ARGUMENTS},",
            "    fs, ints, stack, bits, acc, floats_out, ints_out,",
            "):",
        ]
        self.put("n = s1 - s0")
        self._prefixes()
        self._begin()
        self.put("for c in range(c0, c1):")
        self.level = 2
        self.put("cut = cuts[c]")
        self._advance()
        self._windows()
        self._emit()
        self.put("row += 1")
        return "\n".join(self.lines) + "\n"

    def _prefixes(self) -> None:
        """Prefix sums and counts of all the entity's events."""
        made = self.made
        if not made.doubles and not made.ints:
            return
        for q in range(len(made.sums)):
            self.put(f"h{q} = 0.0\nl{q} = 0.0\nfs[z, {2 * q}] = 0.0\nfs[z, {2 * q + 1}] = 0.0")
        for i in range(made.ints):
            self.put(f"n{i} = 0\nints[z, {i}] = 0")
        self.put("for i in range(n):")
        self.level = 2
        if made.filters:
            self.put("flag = int(flags[s0 + i])")
        for f in range(len(made.filters)):
            self.put(f"n{len(made.measures) + f} += (flag >> {f}) & 1")
        for j, measure in enumerate(made.measures):
            self.put(f"x = m[{j}, s0 + i]\nif x == x:\n    n{j} += 1")
            if (measure, "t", None) in made.sums:
                self.put("u = float(t[s0 + i] - t[s0])", 1)
            for q, (name, term, chosen) in enumerate(made.sums):
                if name != measure:
                    continue
                deeper = 1
                if chosen is not None:
                    self.put(f"if (flag >> {made.filters.index(chosen)}) & 1:", 1)
                    deeper = 2
                factors = term.replace("t", "u")
                a = factors[0]
                if len(factors) > 1:
                    b = factors[1]
                    self.put(f"p = {a} * {b}\nl{q} += product_error({a}, {b}, p)", deeper)
                    a = "p"
                self.put(f"s = h{q} + {a}\nl{q} += sum_error(h{q}, {a}, s)\nh{q} = s", deeper)
        for q in range(len(made.sums)):
            self.put(f"fs[z + i + 1, {2 * q}] = h{q}\nfs[z + i + 1, {2 * q + 1}] = l{q}")
        for i in range(made.ints):
            self.put(f"ints[z + i + 1, {i}] = n{i}")
        self.level = 1

    def _has(self, *kinds: str) -> bool:
        return any(f.aggregation in kinds for f in self.made.features)

    def _begin(self) -> None:
        made = self.made
        self.put("e = 0\nlast = -1")
        for i, (_, whole, _) in enumerate(made.columns):
            self.put(f"v{i} = {0 if whole else 0.0}")
        for w in range(len(made.windows)):
            self.put(f"p{w} = 0")
            for k in range(len(made.stacks)):
                self.put(f"k{k}_{w} = 0")
        for k in range(len(made.stacks)):
            self.put(f"depth{k} = 0\nlow{k} = 0")
        for d in range(len(made.distinct)):
            self.put(f"seen{d} = 0")
        for y in range(len(made.horizons)):
            self.put(f"y{y} = 0")
        if made.categories:
            self.put(
                f"for i in range({made.total_slots}):\n    acc[i, 0] = 0.0\n    acc[i, 1] = 0.0"
            )
        for i in range(len(self._decays())):
            self.put(f"decay{i} = 0.0")
        if self._has("gap_max"):
            self.put("gap_max = NAN")
        if self._has("gap_std"):
            self.put("gap_h = 0.0\ngap_l = 0.0")

    def _advance(self) -> None:
        """Running state over the events before the cutoff."""
        made = self.made
        self.put("while e < n and t[s0 + e] < cut:")
        self.level = 3
        if self._has("gap_max", "gap_std"):
            self.put("if e > 0:\n    g = float(t[s0 + e] - t[s0 + e - 1])")
            if self._has("gap_max"):
                self.put("if not gap_max >= g:\n    gap_max = g", 1)
            if self._has("gap_std"):
                self.put(
                    "p = g * g\ns = gap_h + p\n"
                    "gap_l += sum_error(gap_h, p, s) + product_error(g, g, p)\ngap_h = s",
                    1,
                )
        for i, (subject, half_life) in enumerate(self._decays()):
            rate = f"{LN2!r} / {fixed_us(half_life)}.0"
            self.put(f"if e > 0:\n    decay{i} *= math.exp((t[s0 + e - 1] - t[s0 + e]) * {rate})")
            if subject is None:
                self.put(f"decay{i} += 1.0")
            else:
                j = list(made.measures).index(subject)
                self.put(f"if m[{j}, s0 + e] == m[{j}, s0 + e]:\n    decay{i} += m[{j}, s0 + e]")
        for d in range(len(made.distinct)):
            self.put(
                f"""
if e & 63 == 0:
    bits[{d}, zw + (e >> 6)] = np.uint64(0)
before = int(previous[{d}, s0 + e])
if before > -2:
    bits[{d}, zw + (e >> 6)] |= np.uint64(1) << np.uint64(e & 63)
    if before >= 0:
        bits[{d}, zw + (before >> 6)] ^= np.uint64(1) << np.uint64(before & 63)
    else:
        seen{d} += 1
"""
            )
        shares = bool(made.categories)
        for j, measure in enumerate(made.measures):
            stacks = [(k, how) for k, (name, how) in enumerate(made.stacks) if name == measure]
            if not stacks and not (shares and j == 0):
                continue
            self.put(f"x = m[{j}, s0 + e]\nif x == x:")
            if shares and j == 0:
                for k, base in enumerate(made.slots):
                    self.put(
                        f"i = {base} + int(slot[{k}, s0 + e])\n"
                        "h = acc[i, 0]\ns = h + x\n"
                        "acc[i, 1] += sum_error(h, x, s)\nacc[i, 0] = s",
                        1,
                    )
            for k, how in stacks:
                worse = "<=" if how == "max" else ">="
                self.put(
                    f"while depth{k} > 0 and m[{j}, s0 + stack[z + depth{k} - 1, {k}]] {worse} x:\n"
                    f"    depth{k} -= 1\n"
                    f"stack[z + depth{k}, {k}] = e\n"
                    f"if depth{k} < low{k}:\n    low{k} = depth{k}\n"
                    f"depth{k} += 1",
                    1,
                )
        self.put("e += 1")
        self.level = 2

    def _windows(self) -> None:
        """Moves the windows' first events and the horizons' ends to this cutoff's."""
        made = self.made
        self.put("moved = e != last\nlast = e")
        for w in range(len(made.windows)):
            self.put(
                f"moved{w} = moved\n"
                f"while p{w} < e and t[s0 + p{w}] < starts[{w}, c]:\n"
                f"    p{w} += 1\n    moved{w} = True"
            )
            for k in range(len(made.stacks)):
                self.put(
                    f"if k{k}_{w} > low{k}:\n    k{k}_{w} = low{k}\n"
                    f"while k{k}_{w} < depth{k} and stack[z + k{k}_{w}, {k}] < p{w}:\n"
                    f"    k{k}_{w} += 1"
                )
        for k in range(len(made.stacks)):
            self.put(f"low{k} = depth{k}")
        for y in range(len(made.horizons)):
            self.put(
                f"movedy{y} = moved\n"
                f"while y{y} < n and t[s0 + y{y}] < ends[{y}, c]:\n"
                f"    y{y} += 1\n    movedy{y} = True"
            )

    def _emit(self) -> None:
        """Writes the row; what no event has entered or left since the last one is not redone."""
        groups: dict[str, list[tuple[str, Callable[[], str]]]] = {}
        for i, feature in enumerate(self.made.features):
            value = partial(self._value, feature)
            groups.setdefault(self._condition(feature), []).append((f"v{i}", value))
        for i, label in enumerate(self.made.labels, len(self.made.features)):
            y = self.made.horizons.index(label.horizon_days)
            groups.setdefault(f"movedy{y}", []).append((f"v{i}", partial(self._label, label, y)))
        for condition, members in groups.items():
            self.known = set()
            self.put(f"if {condition}:")
            self.level = 3
            for name, written in members:
                text = written()
                self.put(f"{name} = {text}")
            self.level = 2
        for i, target in enumerate(self.made.targets):
            self.put(f"{target} = v{i}")

    def _condition(self, feature: Feature) -> str:
        """When a feature may differ from the entity's row before."""
        if feature.aggregation in _BY_TIME or feature.value == "recency":
            return "True"
        windows = [w for w in (feature.window, feature.long) if w is not None]
        moved = [f"moved{list(self.made.windows).index(w)}" for w in windows]
        return " or ".join(moved) or "moved"

    def _label(self, label: LabelSpec, y: int) -> str:
        if label.kind == "sum":
            h, low = self._sum(str(label.measure), "x", None, f"y{y}", "e", f"y{y}")
            return f"{h} + {low}"
        test = {"none": " == 0", "any": " > 0", "count": ""}[label.kind]
        return f"int(y{y} - e{test})"

    def _once(self, name: str, text: str) -> str:
        """Writes `name = text` unless this row has it already."""
        if name not in self.known:
            self.known.add(name)
            self.put(f"{name} = {text}")
        return name

    def _sum(
        self, measure: str, term: str, chosen: str | None, tag: str, start: str, end: str
    ) -> tuple[str, str]:
        """Names of the pair of doubles that a measure's events start:end sum to."""
        q = self.made.sums.index((measure, term, chosen))
        names = f"wh{q}_{tag}", f"wl{q}_{tag}"
        if names[0] not in self.known:
            a, al = f"eh{q}_{end}", f"el{q}_{end}"
            self._once(a, f"fs[z + {end}, {2 * q}]")
            self._once(al, f"fs[z + {end}, {2 * q + 1}]")
            if start == "0":
                return a, al
            b, bl = f"fs[z + {start}, {2 * q}]", f"fs[z + {start}, {2 * q + 1}]"
            self._once(names[0], f"{a} - {b}")
            self._once(names[1], f"({al} - {bl}) + sum_error({a}, -{b}, {names[0]})")
        return names

    def _number(self, column: int, tag: str, start: str) -> str:
        """Name of the number of counted events in start:e."""
        name = f"wn{column}_{tag}"
        end = self._once(f"en{column}", f"ints[z + e, {column}]")
        return end if start == "0" else self._once(name, f"{end} - ints[z + {start}, {column}]")

    def _value(self, feature: Feature) -> str:
        """The expression of a feature; writes what it needs first."""
        made, how = self.made, feature.aggregation
        if how == "decay":
            i = self._decays().index((feature.subject, str(feature.window)))
            rate = f"{LN2!r} / {fixed_us(str(feature.window))}.0"
            return f"decay{i} * math.exp((t[s0 + e - 1] - cut) * {rate}) if e > 0 else 0.0"
        tag, start = self._window(feature.window)
        timing = {
            "recency": ("0", "(cut - t[s0 + e - 1]) / DAY_US"),
            "tenure": ("0", "(cut - t[s0]) / DAY_US"),
            "gap_mean": ("1", "(t[s0 + e - 1] - t[s0]) / (DAY_US * (e - 1))"),
            "gap_max": ("1", "gap_max / DAY_US"),
            "gap_std": (
                "2",
                "spread(e - 1, float(t[s0 + e - 1] - t[s0]), 0.0, gap_h, gap_l) / DAY_US",
            ),
        }
        if how in timing:
            least, text = timing[how]
            return f"{text} if e > {least} else NAN"
        if how == "since_last":
            return f"(cut - t[s0 + e - {feature.value}]) / DAY_US if e >= {feature.value} else NAN"
        if how == "rfm":
            return self._score(feature, tag, start)
        if how == "overdue":
            return (
                "(cut - t[s0 + e - 1]) / ((t[s0 + e - 1] - t[s0]) / (e - 1.0)) "
                "if e > 1 and t[s0 + e - 1] > t[s0] else NAN"
            )
        if how == "share":
            h, low = self._sum(made.measures[0], "x", None, "L", "0", "e")
            whole = self._once("whole", f"{h} + {low}")
            k = list(made.categories).index(str(feature.subject))
            i = made.slots[k] + self.spec.categories[str(feature.subject)].values.index(
                feature.value  # type: ignore[arg-type]
            )
            return f"(acc[{i}, 0] + acc[{i}, 1]) / {whole} if {whole} != 0.0 else NAN"
        if how == "trend":
            parts = []
            for window in (feature.window, feature.long):
                tag, start = self._window(window)
                if feature.subject is None:
                    parts.append(self._once(f"count{tag}", f"e - {start}"))
                else:
                    h, low = self._sum(feature.subject, "x", None, tag, start, "e")
                    j = list(made.measures).index(feature.subject)
                    parts.append(self._once(f"sum{j}_{tag}", f"{h} + {low}"))
            return f"{parts[0]} / {parts[1]} if {parts[1]} != 0 else NAN"
        if how == "count":
            if feature.filter is not None:
                column = len(made.measures) + list(made.filters).index(feature.filter)
                return self._number(column, tag, start)
            return f"e - {start}"
        if how == "distinct":
            d = list(made.distinct).index(str(feature.subject))
            return f"seen{d}" if start == "0" else f"bits_between(bits, {d}, zw, {start}, e)"
        measure = str(feature.subject)
        j = list(made.measures).index(measure)
        if how == "first":
            return f"first_value(m, {j}, s0 + {start}, s0 + e)"
        if how == "last":
            return f"last_value(m, {j}, s0 + {start}, s0 + e)"
        if how in ("min", "max"):
            k = list(made.stacks).index((measure, how))
            at = "0" if start == "0" else f"k{k}_{tag}"
            return f"m[{j}, s0 + stack[z + {at}, {k}]] if {at} < depth{k} else NAN"
        h, low = self._sum(measure, "x", feature.filter, tag, start, "e")
        if how == "sum":
            return f"{h} + {low}"
        number = self._number(j, tag, start)
        if how == "mean":
            return f"({h} + {low}) / {number} if {number} > 0 else NAN"
        if how == "slope":
            sums = [self._sum(measure, term, None, tag, start, "e") for term in ("t", "tt", "tx")]
            pairs = ", ".join(name for pair in sums for name in pair)
            return f"slope({number}, {h}, {low}, {pairs})"
        assert how == "std"
        h2, low2 = self._sum(measure, "xx", None, tag, start, "e")
        return f"spread({number}, {h}, {low}, {h2}, {low2})"

    def _score(self, feature: Feature, tag: str, start: str) -> str:
        rfm = self.spec.rfm
        assert rfm is not None
        which = str(feature.value)
        if which == "recency":
            value, test = "recency", "<="
            self._once(value, "(cut - t[s0 + e - 1]) / DAY_US if e > 0 else math.inf")
        elif which == "frequency":
            value, test = self._once(f"count{tag}", f"e - {start}"), ">="
        else:
            h, low = self._sum(str(feature.subject), "x", None, tag, start, "e")
            value, test = self._once(f"total{tag}", f"{h} + {low}"), ">="
        bounds: list[float] = getattr(rfm, which)
        return " + ".join(["1", *(f"int({value} {test} {bound!r})" for bound in bounds)])

    def _decays(self) -> list[tuple[str | None, str]]:
        """Subject and half-life of each running decayed sum."""
        features = (f for f in self.made.features if f.aggregation == "decay")
        return [(f.subject, str(f.window)) for f in features]

    def _window(self, window: str | None) -> tuple[str, str]:
        """A window's tag in names, and the variable of its first event."""
        if window is None:
            return "L", "0"
        w = list(self.made.windows).index(window)
        return str(w), f"p{w}"
