// The stream from the hub: comes back by itself, knows when it is cut, and never lets old data pass for new.
const LOST_MS = 6000; // three silent beats

export class Stream {
  // on: {event(kind, event, isOld), gap(words), state("live" | "lost", sinceMs, words)}
  constructor(on) {
    this.on = on;
    this.lastId = "";
    this.heardAt = performance.now();
    this.heardWall = Date.now();
    this.skew = 0; // the hub's clock less ours
    this.oldUntil = Infinity; // events up to this number happened before we looked
    this.open();
    setInterval(() => this.check(), 1000);
  }

  open() {
    const source = new EventSource("/events" + (this.lastId ? "?after=" + encodeURIComponent(this.lastId) : ""));
    this.source = source;
    source.addEventListener("hello", (m) => { this.oldUntil = this.heard(m).number; });
    source.addEventListener("beat", (m) => this.heard(m));
    source.addEventListener("gap", (m) => {
      const gap = this.heard(m);
      this.on.gap(gap.missed === null ? `Gap: ${gap.why}; what came before it may be missing here.`
        : `Gap: ${gap.missed} ${gap.why}.`);
    });
    source.addEventListener("dropped", (m) => this.on.gap(`Gap: ${this.heard(m).why}.`));
    for (const kind of ["telemetry", "phase", "score", "confusion", "perf", "profile"]) {
      source.addEventListener(kind, (m) => {
        const event = this.heard(m);
        this.lastId = m.lastEventId;
        this.on.event(kind, event, Number(m.lastEventId.split(".")[1]) <= this.oldUntil);
      });
    }
    source.onerror = () => { this.check(); };
  }

  heard(message) {
    const data = JSON.parse(message.data);
    this.heardAt = performance.now();
    this.heardWall = Date.now();
    if (message.type === "hello" || message.type === "beat") this.skew = data.t_wall_ns / 1e6 - Date.now();
    this.on.state("live", this.heardWall, "live");
    return data;
  }

  check() {
    const isCut = this.source.readyState !== EventSource.OPEN;
    const silentMs = performance.now() - this.heardAt;
    if (silentMs > LOST_MS || (isCut && silentMs > 2500)) {
      this.on.state("lost", this.heardWall, this.refused ?? "No connection");
    }
    // A browser gives up for good after a refusal; a wedged stream is opened anew.
    if (this.source.readyState === EventSource.CLOSED || silentMs > 4 * LOST_MS) {
      this.source.close();
      this.heardAt = performance.now() - LOST_MS - 1;
      fetch("/about.json", { cache: "no-store" })
        .then((answer) => { this.refused = answer.status === 401 ? "Not let in: open the address that the dashboard printed" : undefined; })
        .catch(() => { this.refused = undefined; });
      this.open();
    }
  }

  // When something was made, on our clock: an old event's own stamp, a new one's arrival.
  madeAt(event, isOld) { return isOld ? event.t_wall_ns / 1e6 - this.skew : Date.now(); }
}
