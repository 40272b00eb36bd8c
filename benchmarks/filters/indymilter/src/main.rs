// SPDX-License-Identifier: GPL-3.0-or-later
//! The filter with indymilter: `indymilter_filter SOCKET`. "No reply" for each stage but the end of the message.

use indymilter::{Actions, Callbacks, Config, ContextActions, ProtoOpts, Status};
use std::ffi::CString;
use tokio::net::{TcpListener, UnixListener};

fn no_replies() -> ProtoOpts {
    ProtoOpts::NOREPLY_CONNECT
        | ProtoOpts::NOREPLY_HELO
        | ProtoOpts::NOREPLY_MAIL
        | ProtoOpts::NOREPLY_RCPT
        | ProtoOpts::NOREPLY_DATA
        | ProtoOpts::NOREPLY_HEADER
        | ProtoOpts::NOREPLY_EOH
        | ProtoOpts::NOREPLY_BODY
}

fn callbacks() -> Callbacks<usize> {
    Callbacks::new()
        .on_negotiate(|context, _, offered| {
            Box::pin(async move {
                context.requested_actions = Actions::ADD_HEADER;
                context.requested_opts = offered & no_replies();
                Status::Continue
            })
        })
        .on_connect(|_, _, _| Box::pin(async { Status::Noreply }))
        .on_helo(|_, _| Box::pin(async { Status::Noreply }))
        .on_mail(|context, _| {
            Box::pin(async move {
                context.data = Some(0);
                Status::Noreply
            })
        })
        .on_rcpt(|_, _| Box::pin(async { Status::Noreply }))
        .on_data(|_| Box::pin(async { Status::Noreply }))
        .on_header(|context, _, value| {
            Box::pin(async move {
                *context.data.get_or_insert(0) += value.as_bytes().len();
                Status::Noreply
            })
        })
        .on_eoh(|_| Box::pin(async { Status::Noreply }))
        .on_body(|context, chunk| {
            Box::pin(async move {
                *context.data.get_or_insert(0) += chunk.len();
                Status::Noreply
            })
        })
        .on_eom(|context| {
            Box::pin(async move {
                let sum = CString::new(context.data.unwrap_or(0).to_string()).expect("digits");
                match context.actions.add_header(c"X-Sum", sum).await {
                    Ok(()) => Status::Continue,
                    Err(_) => Status::Tempfail,
                }
            })
        })
}

#[tokio::main]
async fn main() {
    let socket = std::env::args().nth(1).expect("usage: indymilter_filter SOCKET");
    let config = Config {
        max_connections: 4096,
        ..Default::default()
    };
    let forever = std::future::pending::<()>();
    if let Some(path) = socket.strip_prefix("unix:") {
        let listener = UnixListener::bind(path).expect("the socket cannot be opened");
        indymilter::run(listener, callbacks(), config, forever).await
    } else {
        let (port, host) = socket.trim_start_matches("inet:").split_once('@').expect("inet:PORT@HOST");
        let listener = TcpListener::bind(format!("{host}:{port}")).await.expect("the socket cannot be opened");
        indymilter::run(listener, callbacks(), config, forever).await
    }
    .expect("the filter failed");
}
