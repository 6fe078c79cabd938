//! What goes wrong, what operators do, and how it ends.

use std::time::Duration;

use super::incus::{Change, Status, Trouble};
use super::link::Way;
use super::plan::Fault;
use super::world::{Event, World};
use pika_cloud_common::Command;

/// Who takes runtimes over.
const OTHER: &str = "owner-of-another-host";

impl World {
    /// A fault comes true.
    pub(super) fn strike(&mut self, fault: Fault) {
        self.say(&"!", format_args!("{fault:?}"));
        let now = self.now;
        match fault {
            Fault::KillCollector(effects, back) => {
                if let Some(collector) = &mut self.host.collector {
                    (collector.kill_in, collector.back_after) = (Some(effects), back);
                }
            }
            Fault::KillInWrite(calls, back) => {
                if let Some(collector) = &mut self.host.collector {
                    collector.back_after = back;
                    self.host.disk.borrow_mut().die_in(calls);
                }
            }
            Fault::CrashHost(back, clock) => self.crash_host(back, clock),
            Fault::Suspend(slept) => {
                if self.host.clock.asleep_until.is_none_or(|until| until <= now) {
                    self.host.clock.sleep(slept, now + slept);
                    self.oracle.slept(slept);
                    self.tick_after_sleep(now + slept);
                }
            }
            Fault::SetClock(by) => {
                self.host.clock.set(by);
                self.oracle.clock_set(by, now);
            }
            Fault::BadDisk(writes, syncs) => self.host.disk.borrow_mut().fail(writes, syncs),
            Fault::FullDisk(free, time) => {
                self.host.disk.borrow_mut().limit(Some(free));
                self.at(now + time, Event::Room);
            }
            Fault::Stubborn => self.incus.trouble.stubborn = 990,
            Fault::IncusDown(time) => self.incus.down_until = now + time,
            Fault::CutLink(runtime, guest, host) => self.cut_link(runtime, guest, host),
            Fault::Command(runtime, command) => self.command(runtime, command),
            Fault::Freeze(runtime, time) => {
                let guest = &mut self.inhabitants[runtime].guest;
                if guest.up {
                    guest.frozen_until = Some(now + time);
                    self.at(now + time, Event::GuestTick(runtime));
                    self.oracle.facts(runtime).silenced = true;
                }
            }
            other => self.strike_guest(other),
        }
    }

    fn strike_guest(&mut self, fault: Fault) {
        let now = self.now;
        match fault {
            Fault::KillSupervisor(runtime) => {
                self.oracle.facts(runtime).supervisor_killed = true;
                self.inhabitants[runtime].guest.kill_supervisor(now);
                self.after_guest(runtime);
            }
            Fault::KillAgent(runtime) => {
                self.inhabitants[runtime].guest.sessions.clear();
                self.cut_link(runtime, false, true);
            }
            Fault::LoseAgent(runtime) => self.lose_agent(runtime),
            Fault::Reboot(runtime) if self.inhabitants[runtime].guest.up => {
                self.oracle.facts(runtime).rebooted = true;
                self.halted(runtime);
                self.started(runtime);
                self.notify(runtime);
            }
            Fault::PowerOff(runtime) | Fault::OperatorStop(runtime) => self.power_off(runtime),
            Fault::Snapshot(runtime, after) if self.inhabitants[runtime].guest.up => {
                self.inhabitants[runtime].guest.snapshot(now);
                self.at(now + after, Event::Restore(runtime));
            }
            Fault::InstanceError(runtime) => {
                let name = self.inhabitants[runtime].name.clone();
                if self.is_ours(&name) && self.incus.set_status(&name, Status::Error) {
                    self.oracle.facts(runtime).errored = true;
                    self.halted(runtime);
                    self.notify(runtime);
                }
            }
            Fault::Pause(runtime, time) => self.pause(runtime, time),
            Fault::OperatorDelete(runtime) => {
                let name = self.inhabitants[runtime].name.clone();
                if self.is_ours(&name) && self.incus.remove(&name) {
                    self.oracle.deleted(runtime);
                    self.changed(runtime, Change::Deleted);
                }
            }
            Fault::OperatorRename(runtime) => self.rename(runtime),
            Fault::TakeOver(runtime) => self.take_over(runtime),
            _ => {}
        }
    }

    /// What was run is gone as well. Where the host has one of its own and the guest takes it, that is nobody's excuse.
    fn lose_agent(&mut self, runtime: usize) {
        let inhabitant = &mut self.inhabitants[runtime];
        if !inhabitant.guest.up {
            return;
        }
        inhabitant.has_agent = false;
        let plan = &self.plan.runtimes[runtime];
        if plan.no_own {
            self.oracle.facts(runtime).agentless = true;
        }
        if plan.is_helpless() {
            self.oracle.facts(runtime).unfit = true;
        }
        self.inhabitants[runtime].guest.sessions.clear();
        self.cut_link(runtime, false, true);
    }

    fn pause(&mut self, runtime: usize, time: Duration) {
        let (now, name) = (self.now, self.inhabitants[runtime].name.clone());
        let running = self.incus.instance(&name).is_some_and(|found| found.status == Status::Running && !found.foreign);
        if running && self.incus.set_status(&name, Status::Frozen) {
            self.oracle.facts(runtime).silenced = true;
            self.inhabitants[runtime].guest.frozen_until = Some(now + time);
            self.at(now + time, Event::Resume(runtime));
            self.notify(runtime);
        }
    }

    pub(super) fn resume(&mut self, runtime: usize) {
        let name = self.inhabitants[runtime].name.clone();
        if self.incus.instance(&name).is_some_and(|found| found.status == Status::Frozen)
            && self.incus.set_status(&name, Status::Running)
        {
            self.notify(runtime);
            self.at(self.now, Event::GuestTick(runtime));
        }
    }

    fn is_ours(&self, name: &str) -> bool {
        self.incus.instance(name).is_some_and(|found| !found.foreign)
    }

    fn rename(&mut self, runtime: usize) {
        let name = self.inhabitants[runtime].name.clone();
        let to = format!("{name}-renamed");
        // Nobody renames what is still being made.
        if !self.inhabitants[runtime].guest.up {
            return;
        }
        if self.is_ours(&name) && self.incus.instance(&to).is_none() && self.incus.rename(&name, &to) {
            self.oracle.facts(runtime).renamed = true;
            self.inhabitants[runtime].name = to;
            self.notify(runtime);
        }
    }

    /// Another collector wins the change of the labels, and dials.
    fn take_over(&mut self, runtime: usize) {
        let name = self.inhabitants[runtime].name.clone();
        let Some(term) = self.incus.take_over(&name, OTHER) else { return };
        self.oracle.taken_over(runtime, self.now);
        let guest = &mut self.inhabitants[runtime].guest;
        if guest.up && !guest.is_frozen(self.now) {
            let owner = &mut guest.machine.files.owner;
            (owner.term, owner.session) = (term, 0);
            guest.tick(self.now);
            self.after_guest(runtime);
        }
        self.notify(runtime);
    }

    /// An instance ends by itself, or by an operator.
    pub(super) fn power_off(&mut self, runtime: usize) {
        let name = self.inhabitants[runtime].name.clone();
        let running = self.incus.instance(&name).is_some_and(|found| found.status == Status::Running && !found.foreign);
        if running && self.incus.set_status(&name, Status::Stopped) {
            self.oracle.facts(runtime).stopped = true;
            self.changed(runtime, Change::Stopped);
        }
    }

    pub(super) fn restore(&mut self, runtime: usize) {
        let name = self.inhabitants[runtime].name.clone();
        let running = self.incus.instance(&name).is_some_and(|found| found.status == Status::Running);
        if !running || self.quiet || !self.inhabitants[runtime].guest.up {
            return;
        }
        if self.inhabitants[runtime].guest.restore(self.now) {
            self.say(&format_args!("g{runtime}"), format_args!("is restored to its snapshot"));
            self.oracle.facts(runtime).rewound = true;
            let now = self.now;
            for at in 0..self.streams.len() {
                if self.streams[at].guest == runtime && !self.streams[at].link.is_cut() {
                    // Connections of a restored machine are dead, and nobody is told.
                    self.streams[at].link.cut(now, None, None);
                }
            }
            self.after_guest(runtime);
        }
    }

    fn cut_link(&mut self, runtime: usize, guest: bool, host: bool) {
        let now = self.now;
        let Some(at) = self.streams.iter().rposition(|s| s.runtime == runtime && !s.link.is_cut()) else { return };
        let learns = |random: &mut super::random::Random, learns: bool| learns.then(|| random.millis(0, 3000));
        let (guest, host) = (learns(&mut self.random, guest), learns(&mut self.random, host));
        self.streams[at].link.cut(now, guest, host);
        self.oracle.facts(runtime).silenced = true;
        self.next_read(at, Way::ToGuest);
        self.next_read(at, Way::ToHost);
    }

    fn crash_host(&mut self, back: Duration, clock: i64) {
        if let Some(collector) = &mut self.host.collector {
            collector.back_after = back;
        }
        let lived = self.host.collector.is_some();
        self.kill_collector();
        self.host.disk.borrow_mut().crash();
        self.host.clock.set(clock);
        self.host.clock.boot(self.now);
        self.oracle.host_booted(clock, self.now);
        if !lived {
            self.at(self.now + back, Event::Collect);
        }
    }

    /// Whatever slept finds itself later.
    fn tick_after_sleep(&mut self, wakes: Duration) {
        for runtime in 0..self.plan.runtimes.len() {
            if let Some(serial) = self.host.serial(runtime) {
                self.at(wakes, Event::Tick(serial, runtime));
            }
        }
    }

    /// A command, of whoever is there to say it.
    pub(super) fn command(&mut self, runtime: usize, command: Command) {
        let reading = self.host.clock.read(self.now);
        let Some(driven) = self.host.driven(runtime) else { return };
        driven.core.command(command, reading);
        self.oracle.facts(runtime).commanded = true;
        // What it wants is performed with the next thing that happens, at once.
        if let Some(serial) = self.host.serial(runtime) {
            self.at(self.now, Event::Tick(serial, runtime));
        }
    }

    /// No more faults: what runs for ever is ended by a command.
    pub(super) fn be_quiet(&mut self) {
        self.say(&"!", format_args!("nothing goes wrong from here on"));
        self.quiet = true;
        self.incus.trouble = Trouble::default();
        self.plan.lost_wakes = 0;
        {
            let mut disk = self.host.disk.borrow_mut();
            disk.limit(None);
            disk.fail(0, 0);
            if !disk.is_dead() {
                disk.revive();
            }
        }
        if let Some(collector) = &mut self.host.collector {
            collector.kill_in = None;
        }
        if self.host.collector.is_none() {
            self.at(self.now, Event::Collect);
        }
        for runtime in 0..self.plan.runtimes.len() {
            if self.random.chance(700) {
                let command = self.random.pick(&[Command::Cancel, Command::Stop, Command::Destroy]);
                let after = self.random.millis(0, 2000);
                self.at(self.now + after, Event::Say(runtime, command));
            } else {
                let after = Duration::from_secs(100);
                self.at(self.now + after, Event::Say(runtime, Command::Cancel));
            }
        }
        self.oracle.quiet(self.now);
    }
}
