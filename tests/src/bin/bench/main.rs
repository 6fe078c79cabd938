//! `bench`: measures what the project promises, each figure against its limit or its peer in the same run.
//!
//! ```text
//!   main ──► verb        one `pika-guest ready` as a process, against an empty program
//!        ──► size        the agent's size
//!        ──► latency     appended in a guest ──► in a consumer's hands, against the bare websocket's round trip
//!        ──► throughput  a guest's file ──► durable in the journal, against what else moves lines
//!        ──► many        10,000 runtimes in one collector: memory, time, a burst of events, a restart
//!        ──► overhead    `pika-cloud run`, against the bare calls to Incus
//!        ──► vm          a virtual machine over vsock, against bare streams to the same one
//! ```
//!
//! Times on a machine that does other things too are uneven, so whatever is compared is measured in turns, and medians
//! are compared. What each figure says exactly stands at the top of its module.

mod figure;
mod incus;
mod latency;
mod many;
mod overhead;
mod peers;
mod setting;
mod size;
mod stats;
mod throughput;
mod verb;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};

use figure::{Figure, Report};
use setting::Setting;

const AFTER_HELP: &str = "\
It is run by `cargo xtask bench`, which builds the programs, starts a private Incus and says where they are:
  PIKA_TEST_AGENT         the static pika-guest
  PIKA_TEST_CLOUD         pika-cloud
  PIKA_BENCH_EMPTY        an empty static program
  PIKA_TEST_INCUS_SOCKET  the daemon's socket
  PIKA_TEST_INCUS_DIR     the daemon's folder; scratch goes beside it
  PIKA_TEST_VM_DEVICE, PIKA_TEST_VM_KERNEL, PIKA_TEST_VM_INITRAMFS
                          what virtual machines are made of, or in PIKA_TEST_VM_SKIP why there are none

Exit codes:
  0   everything was measured, whether it holds or not: that stands in the figures
  1   something could not be measured; what could was printed
  64  wrong usage";

/// Measure what pika-cloud promises, each figure against its limit or its peer in the same run.
#[derive(Debug, Parser)]
#[command(name = "bench", after_help = AFTER_HELP, max_term_width = 110)]
struct Args {
    /// Print one JSON object a figure, with `name`, `value`, `unit`, `limit`, `holds`, instead of a table
    #[arg(long)]
    json: bool,

    /// Be the collector that is measured: drive the runtimes of this state dir, with the guests on standard input
    #[arg(long, hide = true, requires = "runtimes")]
    collector: Option<PathBuf>,

    /// How many
    #[arg(long, hide = true)]
    runtimes: Option<usize>,

    /// Measure these only
    #[arg(value_enum)]
    only: Vec<Group>,
}

/// Figures that are measured together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Group {
    /// `pika-guest ready` as a process
    Verb,
    /// The agent's size
    Size,
    /// From a guest's append to a consumer's hands
    Latency,
    /// From a guest's file to the journal
    Throughput,
    /// 10,000 runtimes in one collector
    Many,
    /// `pika-cloud run` over the bare calls
    Overhead,
    /// A virtual machine over vsock
    Vm,
}

impl Group {
    fn name(self) -> &'static str {
        match self {
            Self::Verb => "verb",
            Self::Size => "size",
            Self::Latency => "latency",
            Self::Throughput => "throughput",
            Self::Many => "many",
            Self::Overhead => "overhead",
            Self::Vm => "vm",
        }
    }

    async fn measure(self, setting: &Setting) -> anyhow::Result<Vec<Figure>> {
        match self {
            Self::Verb => verb::measure(setting).await,
            Self::Size => size::measure(setting),
            Self::Latency => latency::measure(setting).await,
            Self::Throughput => throughput::measure(setting).await,
            Self::Many => many::measure(setting).await,
            Self::Overhead => overhead::measure(setting).await,
            Self::Vm => vm::measure(setting).await,
        }
    }
}

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(64) } else { ExitCode::SUCCESS };
        }
    };
    if let (Some(state), Some(runtimes)) = (&args.collector, args.runtimes) {
        return done(many::run_collector(state, runtimes).map(|()| true));
    }
    // As `pika-cloud` has it.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let measured = runtime.context("no threads can be had").and_then(|runtime| {
        let measured = runtime.block_on(measure(&args));
        runtime.shutdown_background();
        measured
    });
    done(measured)
}

fn done(measured: anyhow::Result<bool>) -> ExitCode {
    match measured {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Measures; says whether all could be.
async fn measure(args: &Args) -> anyhow::Result<bool> {
    let setting = Setting::from_environment()?;
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let measured = tokio::select! {
        measured = measure_all(args, &setting) => Some(measured),
        _ = interrupt.recv() => None,
        _ = terminate.recv() => None,
    };
    setting.incus.remove_all(setting.prefix()).await.context("removing the instances")?;
    measured.context("interrupted")
}

async fn measure_all(args: &Args, setting: &Setting) -> bool {
    let wanted = |group: &Group| args.only.is_empty() || args.only.contains(group);
    let mut report = Report::new(args.json);
    let mut complete = true;
    for group in Group::value_variants().iter().filter(|group| wanted(group)) {
        match group.measure(setting).await {
            Ok(figures) => report.add(figures),
            Err(error) => {
                eprintln!("bench: {}: {error:#}", group.name());
                complete = false;
            }
        }
    }
    report.finish();
    complete
}
