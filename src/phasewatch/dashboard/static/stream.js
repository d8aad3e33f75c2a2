// The event stream of the hub: it reconnects, detects a lost connection and marks events from before the page was opened.
// A browser allows six connections per host, so the tabs of one dashboard share one stream. The tab that holds the lock
// receives the stream and forwards it. Each tab first reads the past with its own stream and then closes it.
const LOST_MS = 6000; // three missed heartbeats
const LOCK = "phasewatch-stream";
const MOST_WAITING = 2000; // forwarded messages kept while a tab reads the past; older ones come from its own stream
const EVENTS = ["telemetry", "phase", "score", "confusion", "perf", "profile"];

export class Stream {
  // on: {event(kind, event, isOld), gap(words), state("live" | "lost", sinceMs, words)}
  constructor(on) {
    this.on = on;
    this.lastId = "";
    this.heardAt = performance.now();
    this.heardWall = Date.now();
    this.skew = 0; // clock of the hub minus clock of the browser, ms
    this.oldUntil = Infinity; // events up to this number are older than this page
    this.role = "alone"; // then "leader" (receives the shared stream) or "follower" (gets it from the leader)
    this.hasPast = false;
    this.waiting = [];
    this.share();
    this.open();
    setInterval(() => this.check(), 1000);
  }

  share() {
    if (!navigator.locks || !window.BroadcastChannel) return; // old browser: one stream per tab
    this.channel = new BroadcastChannel(LOCK);
    this.channel.onmessage = (m) => this.forwarded(m.data);
    const lead = () => {
      this.role = "leader";
      this.waiting = [];
      if (this.source === null) this.open();
      return new Promise(() => {}); // the lock is held until the tab is closed
    };
    navigator.locks.request(LOCK, { ifAvailable: true }, (lock) => {
      if (lock) return lead();
      this.role = "follower";
      this.leave();
      navigator.locks.request(LOCK, lead);
      return undefined;
    });
  }

  open() {
    const source = new EventSource("/events" + (this.lastId ? "?after=" + encodeURIComponent(this.lastId) : ""));
    this.source = source;
    for (const kind of ["hello", "beat", "gap", "dropped", ...EVENTS]) {
      source.addEventListener(kind, (m) => {
        const message = { kind, text: m.data, id: m.lastEventId };
        if (this.role === "leader") this.channel.postMessage(message);
        const data = this.take(message);
        const number = kind === "hello" ? data.number : numberOf(m.lastEventId);
        this.hasPast ||= kind === "beat" || (kind === "hello" ? number === 0 : EVENTS.includes(kind) && number >= this.oldUntil);
        this.leave();
      });
    }
    source.onerror = () => { this.check(); };
  }

  // Close the own stream of a follower that has read the past.
  leave() {
    if (this.role !== "follower" || !this.hasPast || this.source === null) return;
    this.source.close();
    this.source = null;
    for (const message of this.waiting.splice(0)) this.take(message);
  }

  forwarded(message) {
    if (this.role === "leader") return;
    if (this.source === null) { this.take(message); return; }
    this.waiting.push(message);
    if (this.waiting.length > MOST_WAITING) this.waiting.shift();
  }

  take({ kind, text, id }) {
    const data = JSON.parse(text);
    this.heardAt = performance.now();
    this.heardWall = Date.now();
    if (kind === "hello" || kind === "beat") this.skew = data.t_wall_ns / 1e6 - Date.now();
    this.on.state("live", this.heardWall, "live");
    if (kind === "hello") this.oldUntil = data.number;
    else if (kind === "gap") {
      this.on.gap(data.missed === null ? `Gap: ${data.why}; earlier events may be missing on this page.`
        : `Gap: ${data.missed} ${data.why}.`);
    } else if (kind === "dropped") this.on.gap(`Gap: ${data.why}.`);
    else if (EVENTS.includes(kind) && this.isNews(id)) {
      this.lastId = id;
      this.on.event(kind, data, numberOf(id) <= this.oldUntil);
    }
    return data;
  }

  // An event arrives twice if it is forwarded while the own stream delivers it too.
  isNews(id) { return bootOf(id) !== bootOf(this.lastId) || numberOf(id) > numberOf(this.lastId); }

  check() {
    const isCut = this.source !== null && this.source.readyState !== EventSource.OPEN;
    const silentMs = performance.now() - this.heardAt;
    if (silentMs > LOST_MS || (isCut && silentMs > 2500)) {
      this.on.state("lost", this.heardWall, this.refused ?? "No connection");
    }
    if (this.source === null) return; // the leader reconnects
    // A browser does not retry after a refusal, and a silent stream may hang: open a new one.
    if (this.source.readyState === EventSource.CLOSED || silentMs > 4 * LOST_MS) {
      this.source.close();
      this.heardAt = performance.now() - LOST_MS - 1;
      fetch("/about.json", { cache: "no-store" })
        .then((answer) => { this.refused = answer.status === 401 ? "Access denied: open the address that the dashboard printed" : undefined; })
        .catch(() => { this.refused = undefined; });
      this.open();
    }
  }

  // Time of an event on the browser's clock: the timestamp of an old event, the arrival of a new one.
  madeAt(event, isOld) { return isOld ? event.t_wall_ns / 1e6 - this.skew : Date.now(); }
}

const bootOf = (id) => id.split(".")[0];
const numberOf = (id) => Number(id.split(".")[1]);
