// The list of machines: most urgent first, filtered by name, with rows only for what is visible.
import { STATES, attention, hasTruth, heardAt, isCurrent, isReplay, isStale, isWrong, sorted } from "/static/attention.js";
import { GLYPHS, PHASES, ago, clock, make, score, text } from "/static/format.js";

const ORDER_MS = 2000; // between two changes of the order
const HOLD_MS = 3000; // the order stays while somebody points or types in the list
const SPARE_ROWS = 4;

export class MachineList {
  // place: the listbox; choose(machine): a row was clicked or reached by a key
  constructor(place, machines, choose) {
    Object.assign(this, { place, machines, choose, order: [], filter: "", orderedAt: 0, heldAt: -Infinity, selected: null, isLost: false });
    this.rows = place.querySelector(".rows");
    this.pool = new Map(); // machine id → row
    place.addEventListener("scroll", () => this.draw(), { passive: true });
    for (const kind of ["pointermove", "pointerdown", "keydown"]) place.addEventListener(kind, () => { this.heldAt = performance.now(); });
    place.addEventListener("pointerleave", () => { this.heldAt = -Infinity; });
    place.addEventListener("keydown", (e) => this.key(e));
  }

  get rowHeight() { return parseFloat(getComputedStyle(this.place).getPropertyValue("--row")) || 64; }

  setFilter(words) { this.filter = words.trim().toLowerCase(); this.sort(true); }

  // Sort again if it is time. A new alarm and a new machine never wait.
  sort(isForced = false) {
    const now = performance.now(), wall = Date.now();
    const all = [...this.machines.all.values()].filter((m) => !this.filter || m.vm.toLowerCase().includes(this.filter));
    const alarmed = all.filter((m) => attention(m, wall) === "infection").map((m) => m.id).join();
    const isDue = now - this.orderedAt > ORDER_MS && now - this.heldAt > HOLD_MS;
    if (!isForced && !isDue && all.length === this.order.length && alarmed === this.alarmed && all.every((m) => this.known?.has(m))) return;
    this.orderedAt = now;
    this.alarmed = alarmed;
    this.known = new Set(all);
    this.order = sorted(all, wall);
  }

  select(machine) {
    this.selected = machine.id;
    const at = this.order.indexOf(machine), height = this.rowHeight;
    if (at >= 0) {
      const top = at * height;
      if (top < this.place.scrollTop) this.place.scrollTop = top;
      else if (top + height > this.place.scrollTop + this.place.clientHeight) this.place.scrollTop = top + height - this.place.clientHeight;
    }
    this.draw();
  }

  step(by) {
    if (!this.order.length) return;
    const at = this.order.findIndex((m) => m.id === this.selected);
    this.choose(this.order[Math.min(this.order.length - 1, Math.max(0, at < 0 ? 0 : at + by))]);
  }

  key(e) {
    const page = Math.max(1, Math.floor(this.place.clientHeight / this.rowHeight) - 1);
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[e.key];
    if (by === undefined || e.ctrlKey || e.metaKey || e.altKey) return;
    e.preventDefault();
    this.step(by);
  }

  draw() {
    const height = this.rowHeight, now = Date.now();
    const first = Math.max(0, Math.floor(this.place.scrollTop / height) - SPARE_ROWS);
    const last = Math.min(this.order.length, Math.ceil((this.place.scrollTop + this.place.clientHeight) / height) + SPARE_ROWS);
    const tall = `${this.order.length * height}px`;
    if (this.rows.style.height !== tall) this.rows.style.height = tall;
    const wanted = new Set(this.order.slice(first, last).map((m) => m.id));
    for (const [id, row] of this.pool) if (!wanted.has(id)) { row.remove(); this.pool.delete(id); }
    let before = null;
    for (let at = first; at < last; at += 1) {
      const machine = this.order[at];
      let row = this.pool.get(machine.id);
      if (!row) {
        row = this.make(machine);
        this.pool.set(machine.id, row);
      }
      if (before === null ? this.rows.firstChild !== row : before.nextSibling !== row) {
        if (before === null) this.rows.prepend(row); else before.after(row);
      }
      before = row;
      this.fill(row, machine, at, height, now);
    }
    const active = this.pool.get(this.selected);
    if (active) this.place.setAttribute("aria-activedescendant", active.id); else this.place.removeAttribute("aria-activedescendant");
  }

  make(machine) {
    const row = make("div", "machine");
    row.setAttribute("role", "option");
    row.id = `machine-${MachineList.made = (MachineList.made ?? 0) + 1}`;
    row.onclick = () => this.choose(this.machines.all.get(machine.id) ?? machine);
    for (const part of ["mark", "vm", "badge", "now", "sub"]) { row[part] = make("span", part); row.append(row[part]); }
    row.mark.setAttribute("aria-hidden", "true");
    row.swatch = make("span", "swatch");
    row.phase = make("span", "phase");
    row.now.append(row.swatch, row.phase);
    return row;
  }

  fill(row, machine, at, height, now) {
    const state = attention(machine, now), seen = machine.phase, replay = isReplay(machine);
    const stale = isStale(machine, now) || this.isLost, isOld = seen !== null && !stale && !isCurrent(machine, now);
    const set = (name, value) => { if (row.getAttribute(name) !== value) row.setAttribute(name, value); };
    const top = `translateY(${at * height}px)`;
    if (row.style.transform !== top) row.style.transform = top;
    set("aria-posinset", String(at + 1));
    set("aria-setsize", String(this.order.length));
    set("aria-selected", String(machine.id === this.selected));
    set("data-state", state);
    row.classList.toggle("stale", stale);
    text(row.mark, STATES[state].mark);
    text(row.vm, machine.vm);
    text(row.badge, replay ? "replay" : machine.origin === null ? "source unknown" : "");
    row.badge.hidden = row.badge.textContent === "";
    row.swatch.style.setProperty("--phase", seen ? `var(--${seen.decision})` : "");
    text(row.phase, !seen ? "no prediction yet" : isOld ? `no prediction since ${clock(machine.phaseAt)}`
      : `${GLYPHS[seen.decision] ?? ""} ${seen.decision} ${score(seen.p[PHASES.indexOf(seen.decision)])}`);
    const parts = stale ? [`stale since ${clock(heardAt(machine))}`] : [];
    if (STATES[state].rank < 4) {
      const since = state === "activity" || !seen.alarm ? seen.activity_alarm_since_ns : seen.alarm_since_ns;
      const alarm = machine.alarms.get(seen.alarm ? "infection" : "activity");
      if (state === "silenced" && alarm) parts.push(`silenced until ${clock(alarm.silenced_until_ms)}`);
      else parts.push(STATES[state].words + (since && !replay ? ` ${ago(now - since / 1e6)}` : since ? ` at ${clock(since / 1e6)}` : ""));
    } else if (seen && !stale) parts.push(seen.alarm === null ? "no alarm threshold" : `p(infecting) ${score(seen.p[2])}`);
    if (replay && !stale && seen && hasTruth(seen)) parts.push(isWrong(seen) ? `wrong, truly ${seen.truth}` : "right");
    text(row.sub, parts.join(" · "));
    set("aria-label", `${machine.vm}${replay ? ", replay" : ""}: ${STATES[state].words}, ${row.phase.textContent}${stale ? `, stale since ${clock(heardAt(machine))}` : ""}`);
  }
}
