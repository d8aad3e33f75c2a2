// The stream from the hub: comes back by itself, knows when it is cut, and never lets old data pass for new.
// A browser allows six connections to a host, so the tabs of one dashboard share one stream: the tab that holds the lock
// keeps it and passes on what it hears. Each tab reads the past by a stream of its own, and closes that when it has it.
const LOST_MS = 6000; // three silent beats
const LOCK = "phasewatch-stream";
const MOST_WAITING = 2000; // messages that are kept while a tab still reads the past; its own stream has those before
const EVENTS = ["telemetry", "phase", "score", "confusion", "perf", "profile"];

export class Stream {
  // on: {event(kind, event, isOld), gap(words), state("live" | "lost", sinceMs, words)}
  constructor(on) {
    this.on = on;
    this.lastId = "";
    this.heardAt = performance.now();
    this.heardWall = Date.now();
    this.skew = 0; // the hub's clock less ours
    this.oldUntil = Infinity; // events up to this number happened before we looked
    this.role = "alone"; // then "leader": keeps the shared stream, or "follower": hears it from the leader
    this.hasPast = false;
    this.waiting = [];
    this.share();
    this.open();
    setInterval(() => this.check(), 1000);
  }

  share() {
    if (!navigator.locks || !window.BroadcastChannel) return; // an old browser: a stream for each tab
    this.channel = new BroadcastChannel(LOCK);
    this.channel.onmessage = (m) => this.passedOn(m.data);
    const lead = () => {
      this.role = "leader";
      this.waiting = [];
      if (this.source === null) this.open();
      return new Promise(() => {}); // held until the tab is closed
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

  // Close our own stream, if another tab keeps one and ours has told the past.
  leave() {
    if (this.role !== "follower" || !this.hasPast || this.source === null) return;
    this.source.close();
    this.source = null;
    for (const message of this.waiting.splice(0)) this.take(message);
  }

  passedOn(message) {
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
      this.on.gap(data.missed === null ? `Gap: ${data.why}; what came before it may be missing here.`
        : `Gap: ${data.missed} ${data.why}.`);
    } else if (kind === "dropped") this.on.gap(`Gap: ${data.why}.`);
    else if (EVENTS.includes(kind) && this.isNews(id)) {
      this.lastId = id;
      this.on.event(kind, data, numberOf(id) <= this.oldUntil);
    }
    return data;
  }

  // An event comes twice where it was passed on while our own stream brought it.
  isNews(id) { return bootOf(id) !== bootOf(this.lastId) || numberOf(id) > numberOf(this.lastId); }

  check() {
    const isCut = this.source !== null && this.source.readyState !== EventSource.OPEN;
    const silentMs = performance.now() - this.heardAt;
    if (silentMs > LOST_MS || (isCut && silentMs > 2500)) {
      this.on.state("lost", this.heardWall, this.refused ?? "No connection");
    }
    if (this.source === null) return; // the tab that keeps the stream opens it anew
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

const bootOf = (id) => id.split(".")[0];
const numberOf = (id) => Number(id.split(".")[1]);
