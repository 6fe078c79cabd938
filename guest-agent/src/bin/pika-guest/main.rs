//! `pika-guest`: what a workload and its image call inside a guest. See `pika-guest --help`.

mod args;
mod emit;
mod exit;
mod show;
mod verbs;
mod work;

use std::process::ExitCode;

use clap::Parser as _;
use pika_cloud_common::State;
use pika_guest_agent::ledger::own_caps;

use args::{Cli, Verb};
use exit::{EX_USAGE, Failure};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(EX_USAGE) } else { ExitCode::SUCCESS };
        }
    };
    let done = own_caps::check().map_err(Failure::Environment).and_then(|()| run(cli.verb));
    match done {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            eprintln!("pika-guest: {failure}");
            ExitCode::from(failure.code())
        }
    }
}

fn run(verb: Verb) -> Result<u8, Failure> {
    match verb {
        Verb::Starting(words) => verbs::enter(State::Starting, words, None),
        Verb::Ready(words) => verbs::enter(State::Ready, words, None),
        Verb::Failed(last) => verbs::enter(State::Failed, last.words, last.exit_code),
        Verb::Completed(last) => verbs::enter(State::Completed, last.words, last.exit_code),
        Verb::Progress(progress) => verbs::progress(progress),
        Verb::Status(args) => show::status(&args),
        Verb::Events(args) => show::events(&args),
        Verb::Emit => emit::emit(),
        Verb::Run(args) => work::run(args),
        Verb::Stream(args) => Ok(work::stream(&args)),
        Verb::Serve(args) => work::serve(args),
        Verb::Version(args) => show::version(&args),
        Verb::Supervise(args) => work::supervise(&args),
    }
}
